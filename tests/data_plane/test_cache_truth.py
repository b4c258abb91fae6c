"""What a router believes of a replica's cache, and how it notices over the real data plane that it is wrong."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

import pytest

from router.dispatcher import Dispatcher
from router.link import ReplicaLink
from tests.data_plane.rig import (
    RecordingSink,
    Replica,
    make_dispatcher,
    make_prompt,
    make_request,
    ready_cluster,
    until,
)
from workers.data_plane import DataPlaneTimes
from workers.types import KvEvent

USUAL = DataPlaneTimes()
"""Not quickened: what is noticed is to be noticed within two of these heartbeats."""


async def ask(dispatcher: Dispatcher, prompt: list[int], max_tokens: int = 4) -> RecordingSink:
    sink = RecordingSink()
    dispatcher.submit(make_request(prompt, max_tokens), sink)
    return await sink.wait()


def link_to(dispatcher: Dispatcher, replica: Replica) -> ReplicaLink:
    return dispatcher._fleet.link(replica.replica_id)


async def on_engine_thread(replica: Replica, action: Callable[[], object]) -> None:
    """Run it between two steps, as whatever changes a cache behind everybody's back would."""
    done = asyncio.Event()
    loop = asyncio.get_running_loop()

    def run() -> None:
        action()
        loop.call_soon_threadsafe(done.set)

    replica.thread._inbox.put(run)
    await done.wait()


def empty_silently(replica: Replica) -> None:
    """Forget all cached blocks, and tell nobody."""
    pool = replica.engine._pool
    blocks = pool.allocate(pool.num_free, "nobody")
    assert blocks is not None
    pool.release(blocks)
    pool.drain_events()
    assert pool.resident().num_blocks == 0


async def test_a_cache_emptied_behind_the_routers_back_is_noticed_within_two_seconds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prompt = make_prompt(random.Random(1), 41)
    one, two = Replica("one", times=USUAL), Replica("two", times=USUAL)
    with caplog.at_level(logging.WARNING, logger="router.link"):
        async with ready_cluster(one, two) as dispatcher:
            home = (await ask(dispatcher, prompt)).decisions[0].replica
            emptied = one if home == "one" else two
            state = link_to(dispatcher, emptied).state
            await until(lambda: len(state.resident) == 11)
            await on_engine_thread(emptied, lambda: empty_silently(emptied))
            await until(lambda: not state.resident, timeout_s=2.0)
            assert state.num_resyncs == 1
            sink = await ask(dispatcher, prompt)
            assert sink.decisions[0].matched_tokens == sink.cached_tokens == 0
            views = {view.replica_id: view.num_resyncs for view in dispatcher.replicas()}
            assert views == {emptied.replica_id: 1, (two if home == "one" else one).replica_id: 0}
    assert [record.getMessage() for record in caplog.records if record.name == "router.link"] == [
        f"the cache of {home} is not what was told of it; it is asked for anew"
    ]


async def test_lost_events_are_noticed_and_all_blocks_come_again() -> None:
    prompts = [make_prompt(random.Random(seed), 41) for seed in range(3)]
    replica = Replica("one", times=USUAL)
    async with ready_cluster(replica) as dispatcher:
        state = link_to(dispatcher, replica).state
        await ask(dispatcher, prompts[0])
        await until(lambda: len(state.resident) >= 10)
        drain, lost = replica.engine.kv_events, []

        def lose(*, anew: bool = False) -> list[KvEvent]:
            lost.extend(events := drain(anew=anew))
            return events if anew else []

        replica.engine.kv_events = lose  # type: ignore[method-assign]
        await ask(dispatcher, prompts[1])
        await until(lambda: len(lost) >= 11)
        replica.engine.kv_events = drain  # type: ignore[method-assign]
        await until(lambda: state.resident == replica.engine._pool.resident_hashes(), timeout_s=2.0)
        assert state.num_resyncs == 1
        sink = await ask(dispatcher, prompts[1])
        assert sink.decisions[0].matched_tokens == sink.cached_tokens == 40
        await ask(dispatcher, prompts[2])
        await until(lambda: state.resident == replica.engine._pool.resident_hashes())
        assert state.num_resyncs == 1


async def test_every_router_is_told_anew_when_one_has_found_the_cache_wrong() -> None:
    prompt = make_prompt(random.Random(1), 41)
    replica = Replica("one")
    async with ready_cluster(replica) as dispatcher:
        other = make_dispatcher()
        other.start()
        other.update_replicas([replica.address])
        try:
            await ask(other, prompt)
            states = [link_to(each, replica).state for each in (dispatcher, other)]
            await until(lambda: all(len(state.resident) == 11 for state in states))
            await on_engine_thread(replica, lambda: empty_silently(replica))
            await until(lambda: not any(state.resident for state in states))
        finally:
            await other.stop()


async def test_a_sound_replica_is_never_asked_again_under_load() -> None:
    """The digest travels only when it and the events tell of the same moment; a step between the two was a mismatch."""
    rng = random.Random(5)
    replica = Replica("one", num_blocks=64, fake_step_s=0.0005)
    async with ready_cluster(replica) as dispatcher:
        beginnings = [make_prompt(rng, 24) for _ in range(6)]
        for _ in range(5):
            sinks = [RecordingSink() for _ in range(30)]
            for sink in sinks:
                prompt = rng.choice(beginnings) + make_prompt(rng, rng.randrange(1, 30))
                dispatcher.submit(make_request(prompt, rng.randrange(1, 20)), sink)
            for sink in sinks:
                await sink.wait()
        state = link_to(dispatcher, replica).state
        await until(lambda: state.resident == replica.engine._pool.resident_hashes())
        assert state.num_resyncs == 0
        assert state.num_expected == 0


@pytest.mark.parametrize("num_at_once", [32, 4])
async def test_a_burst_with_one_new_prefix_is_prefilled_once(num_at_once: int) -> None:
    """Each replica computed it (llm-d-router#1726): what was sent counts as cached where it was sent."""
    rng = random.Random(6)
    prefix = make_prompt(rng, 800)
    engine: dict[str, Any] = {"fake_step_s": 0.002, "chunk_tokens": 128, "num_blocks": 1_024}
    replicas = [Replica(name, **engine) for name in ("one", "two", "three", "four")]
    async with ready_cluster(*replicas) as dispatcher:
        sinks = [RecordingSink() for _ in range(32)]
        for number, sink in enumerate(sinks):
            if number % num_at_once == 0:
                await asyncio.sleep(0.001)
            dispatcher.submit(make_request(prefix + make_prompt(rng, 6), 4), sink)
        for sink in sinks:
            assert (await sink.wait()).error is None
        assert len({sink.decisions[0].replica for sink in sinks}) == 1
        assert sorted(sink.cached_tokens or 0 for sink in sinks) == [0] + [800] * 31
        assert sorted(replica.engine.load().num_computed_tokens > 0 for replica in replicas) == [False] * 3 + [True]


async def test_a_cancelled_prompt_is_expected_nowhere() -> None:
    prefix = make_prompt(random.Random(7), 400)
    replica = Replica("one", chunk_tokens=64)
    async with ready_cluster(replica) as dispatcher:
        replica.hold()
        state = link_to(dispatcher, replica).state
        cancel = dispatcher.submit(make_request(prefix), RecordingSink())
        await until(lambda: state.num_expected == 1)
        cancel()
        assert state.num_expected == 0
        dispatcher.check_integrity()
        replica.go_on()


async def test_a_prompt_of_which_each_choice_was_cancelled_is_expected_nowhere() -> None:
    """Nothing more was said of such a work, in either direction, so its blocks were expected while the stream lived."""
    prefix = make_prompt(random.Random(7), 400)
    replica = Replica("one", chunk_tokens=64)
    async with ready_cluster(replica) as dispatcher:
        replica.hold()
        state, sink = link_to(dispatcher, replica).state, RecordingSink()
        cancel = dispatcher.submit(make_request(prefix, n=2), sink)
        await until(lambda: state.num_expected == 1)
        for index in range(2):
            sink.not_wanted.add(index)
            cancel(index)
        assert (await sink.wait()).error is None
        assert state.num_expected == 0
        replica.go_on()
