"""The router's queue before real data ports: overload, storms of cancels, bursts with one prefix, full backlogs."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest
from octavo.names import Reason

from router.types import Attempt, Cancel
from tests.data_plane.rig import RecordingSink, Replica, assert_idle, make_dispatcher, make_prompt, make_request, until
from workers.errors import DeadlineError, OverloadedError


async def test_overload_is_told_at_once_and_what_is_computed_is_in_time() -> None:
    """Ten times what the replica can do. Each request has one end, and few of those sent are too late."""
    rng = random.Random(1)
    replica = await Replica("one", max_num_sequences=4, fake_step_s=0.005).start()
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    await until(lambda: dispatcher.replicas()[0].state == "ready")
    refused: list[OverloadedError] = []
    sinks: list[RecordingSink] = []
    for _ in range(400):
        request = make_request(make_prompt(rng, 12), 10, timeout_s=rng.uniform(0.1, 0.6), has_own_deadline=True)
        sink = RecordingSink()
        try:
            dispatcher.submit(request, sink)
            sinks.append(sink)
        except OverloadedError as error:
            refused.append(error)
        await asyncio.sleep(0.001)
    for sink in sinks:
        await sink.wait()
    answered = [sink for sink in sinks if sink.error is None]
    late = [sink for sink in sinks if isinstance(sink.error, DeadlineError)]
    assert len(answered) + len(late) + len(refused) == 400
    assert all(sink.decisions for sink in answered)
    assert len(answered) >= 0.7 * sum(bool(sink.decisions) for sink in sinks)
    assert refused, "nobody was told at once"
    assert all(error.reason == Reason.DEADLINE_TOO_SHORT and error.retry_after_s for error in refused)
    await assert_idle(dispatcher, replica)
    await dispatcher.stop()
    await replica.stop()


class InOrder(RecordingSink):
    """Notes when it is sent, beside others."""

    def __init__(self, number: int, order: list[int]) -> None:
        super().__init__()
        self._number, self._order = number, order

    def dispatched(self, attempt: Attempt) -> None:
        self._order.append(self._number)
        super().dispatched(attempt)


async def test_without_batching_nothing_is_foreseen() -> None:
    replica = await Replica("one", max_num_sequences=2, fake_step_s=0.005).start()
    dispatcher = make_dispatcher(batching=False)
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    order: list[int] = []
    sinks = [InOrder(number, order) for number in range(60)]
    for number, sink in enumerate(sinks):
        # All of them take 1.5 s at least, and the first two have all the time they may need.
        timeout_s = 0.3 if number >= 2 else 30.0
        request = make_request([1, 2, 3], 10, timeout_s=timeout_s, has_own_deadline=True, priority=number % 3)
        dispatcher.submit(request, sink)
    for sink in sinks:
        await sink.wait()
    ends = Counter("ok" if sink.error is None else sink.error.reason for sink in sinks)
    assert ends.keys() == {"ok", Reason.DEADLINE_PASSED}
    assert order == sorted(order), "first come, first served"
    await assert_idle(dispatcher, replica)
    await dispatcher.stop()
    await replica.stop()


async def test_a_storm_of_cancels_leaves_nothing() -> None:
    rng = random.Random(5)
    replicas = [await Replica(name, fake_step_s=0.001).start() for name in ("one", "two")]
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address for replica in replicas])
    sinks: list[RecordingSink] = []
    cancels: list[Cancel] = []
    for number in range(1_000):
        request = make_request(
            make_prompt(rng, rng.randrange(1, 40)),
            rng.randrange(1, 20),
            tenant=rng.choice("abc"),
            priority=rng.randrange(2),
            timeout_s=20.0,
            has_own_deadline=rng.random() < 0.5,
        )
        sink = RecordingSink()
        try:
            cancels.append(dispatcher.submit(request, sink))
            sinks.append(sink)
        except OverloadedError:
            pass
        if rng.random() < 0.5 and cancels:
            cancels[rng.randrange(len(cancels))]()
        if number % 50 == 0:
            await asyncio.sleep(0.002)
            dispatcher.check_integrity()
    for i, cancel in enumerate(cancels):
        if i % 2:
            cancel()
    for sink in sinks:
        await sink.wait(20.0)
        assert sink.num_ends == 1
    await assert_idle(dispatcher, *replicas)
    await dispatcher.stop()
    for replica in replicas:
        await replica.stop()


async def test_a_burst_with_one_new_prefix_computes_it_once() -> None:
    """A peer scattered such a burst over all replicas, and each computed the prefix (llm-d-router#1726)."""
    rng = random.Random(6)
    replicas = [await Replica(name, fake_step_s=0.002).start() for name in ("one", "two", "three")]
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address for replica in replicas])
    await until(lambda: all(view.state == "ready" for view in dispatcher.replicas()))
    prefix = make_prompt(rng, 160)
    sinks = [RecordingSink() for _ in range(16)]
    for sink in sinks:
        dispatcher.submit(make_request([*prefix, *make_prompt(rng, 4)], 4), sink)
    for sink in sinks:
        await sink.wait()
    computed = sum(replica.engine.runner.num_computed_rows for replica in replicas)
    assert computed < 2 * len(prefix) + 16 * (4 + 4 + 4)
    assert len({sink.decisions[0].replica for sink in sinks}) == 1
    await assert_idle(dispatcher, *replicas)
    await dispatcher.stop()
    for replica in replicas:
        await replica.stop()


async def test_who_has_most_of_a_full_backlog_gives_way() -> None:
    dispatcher = make_dispatcher(max_queued_requests=10)
    dispatcher.start()
    greedy = [RecordingSink() for _ in range(10)]
    for sink in greedy:
        dispatcher.submit(make_request([1], tenant="greedy"), sink)
    with pytest.raises(OverloadedError):
        dispatcher.submit(make_request([1], tenant="greedy"), RecordingSink())
    modest = [RecordingSink() for _ in range(5)]
    for sink in modest:
        dispatcher.submit(make_request([1], tenant="modest"), sink)
    with pytest.raises(OverloadedError):
        dispatcher.submit(make_request([1], tenant="modest"), RecordingSink())
    gone = [sink.error for sink in greedy]
    assert [error is None for error in gone] == [True] * 5 + [False] * 5, "the newest"
    assert all(isinstance(error, OverloadedError) and error.retry_after_s for error in gone[5:])
    assert not any(sink.num_ends for sink in modest)
    dispatcher.check_integrity()
    await dispatcher.stop()
    dispatcher.check_integrity()
