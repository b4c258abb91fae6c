"""A replica that dies, freezes or drains while it answers: another one goes on, and no token is lost or repeated."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from router.dispatcher import MAX_IDLE_LOSSES, MAX_LOSSES
from router.link import LinkTimes
from tests.client.cuttable_proxy import cuttable_proxy
from tests.data_plane.rig import (
    FAST,
    VOCAB,
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    cluster,
    make_prompt,
    make_request,
    until,
)
from workers.errors import UnavailableError
from workers.fake import fake_continuation
from workers.types import FinishReason


async def test_what_a_killed_replica_had_begun_goes_on_elsewhere() -> None:
    """Some run and have tokens, the rest waits there: all are answered whole."""
    lost, other = Replica("lost", max_num_sequences=2, fake_step_s=0.005), Replica("other")
    async with cluster(lost) as dispatcher:
        requests = [make_request(range(i, i + 20), 200) for i in range(6)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        await until(lambda: sum(bool(sink.token_ids) for sink in sinks) == 2)
        await lost.kill()
        assert all(flight.permit is not None for flight in dispatcher._flights)
        dispatcher.check_integrity()
        await other.start()
        dispatcher.update_replicas([other.address])
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
            assert sink.decisions[-1].replica == "other"
        await assert_idle(dispatcher, other)
    await other.stop()


async def test_a_replica_whose_engine_breaks_loses_what_it_has_and_gets_nothing_more() -> None:
    """It answered all that came with INTERNAL, at once, and so had the least load of all until it was replaced."""
    broken, other = Replica("broken", fake_step_s=0.005), Replica("other")

    def fail() -> bool:
        raise RuntimeError("broken by the test")

    async with cluster(broken) as dispatcher:
        requests = [make_request(range(i, i + 20), 200) for i in range(3)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        await until(lambda: all(sink.token_ids for sink in sinks))
        broken.engine.step = fail  # type: ignore[method-assign]
        await until(lambda: dispatcher.replicas()[0].state == "draining")
        await other.start()
        dispatcher.update_replicas([broken.address, other.address])
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
            assert sink.decisions[-1].replica == "other"
        late, sink = make_request(range(20)), RecordingSink()
        dispatcher.submit(late, sink)
        assert_answers(await sink.wait(), late)
        assert [decision.replica for decision in sink.decisions] == ["other"]
        assert broken.thread.is_alive
        dispatcher.update_replicas([other.address])
    await other.stop()


async def test_all_choices_go_on_where_each_of_them_was() -> None:
    lost, other = Replica("lost", fake_step_s=0.003), Replica("other")
    async with cluster(lost) as dispatcher:
        whole, request = RecordingSink(), make_request(range(30), 60, n=3)
        dispatcher.submit(request, whole)
        await whole.wait()
        sink = RecordingSink()
        cancel = dispatcher.submit(request, sink)
        await until(lambda: len(sink.answers) == 3 and all(sink.answers.values()))
        sink.not_wanted.add(1)
        cancel(1)
        await lost.kill()
        await other.start()
        dispatcher.update_replicas([other.address])
        await sink.wait()
        assert sink.error is None
        for index in (0, 2):
            assert sink.answers[index] == whole.answers[index]
        await assert_idle(dispatcher, other)
    await other.stop()


@pytest.mark.parametrize(("tokens", "reason"), [(9, FinishReason.LENGTH), (3, FinishReason.STOP)])
async def test_an_answer_whose_end_alone_was_lost_ends(tokens: int, reason: FinishReason) -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        replica.hold()
        answer = fake_continuation(range(20), tokens, VOCAB)
        stop_token_ids = frozenset(answer[-1:]) if reason is FinishReason.STOP else frozenset()
        request = make_request(range(20), 9, stop_token_ids=stop_token_ids)
        sink = RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.decisions))
        [flight] = dispatcher._flights.aboard
        assert flight.link is not None
        dispatcher.link_delivered(
            flight.link, pb.StepBatch(deltas=[pb.WorkDelta(work_id=flight.work_id, token_ids=answer)])
        )
        await replica.kill()
        await sink.wait()
        assert (sink.error, sink.token_ids) == (None, answer)
        assert sink.finish is not None
        assert sink.finish.reason is reason
        assert len(sink.decisions) == 1


async def test_a_drain_that_takes_too_long_hands_over_what_runs() -> None:
    replica, other = Replica("one", fake_step_s=0.01), Replica("other")
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(20), 300), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        await other.start()
        dispatcher.update_replicas([other.address])
        assert not await replica.server.drain(0.05)
        await replica.server.stop()
        assert_answers(await sink.wait(), request)
        assert [decision.replica for decision in sink.decisions] == ["one", "other"]
    await other.stop()


async def test_a_frozen_replica_is_left_and_what_it_says_when_it_thaws_reaches_nobody() -> None:
    """Behind a proxy that lets nothing through for a while, which is what a stopped process looks like."""
    frozen, other = Replica("frozen", fake_step_s=0.01), Replica("other", fake_step_s=0.01)
    times = replace(FAST, silence_s=1.5)
    async with AsyncExitStack() as stack:
        for replica in (frozen, other):
            await replica.start()
            stack.push_async_callback(replica.stop)
        proxy = await stack.enter_async_context(cuttable_proxy(frozen.server.address))
        dispatcher = await stack.enter_async_context(cluster(times=times))
        dispatcher.update_replicas([replace(frozen.address, address=proxy.address)])
        request, sink = make_request(range(20), 100), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: len(sink.token_ids) > 3)
        proxy.freeze()
        dispatcher.update_replicas([replace(frozen.address, address=proxy.address), other.address])
        await until(lambda: len(sink.decisions) == 2)
        proxy.thaw()
        assert_answers(await sink.wait(), request)
        assert [decision.replica for decision in sink.decisions] == ["frozen", "other"]


async def test_progress_is_what_keeps_a_request_that_loses_replica_after_replica() -> None:
    async with cluster() as dispatcher:
        request, sink = make_request(range(20), 900), RecordingSink()
        dispatcher.submit(request, sink)
        for number in range(6):
            replica = await Replica(f"replica-{number}", fake_step_s=0.01).start()
            before = len(sink.token_ids)
            dispatcher.update_replicas([replica.address])
            await until(partial(lambda before: len(sink.token_ids) > before, before))
            await replica.kill()
        last = await Replica("last").start()
        dispatcher.update_replicas([last.address])
        assert_answers(await sink.wait(), request)
        await last.stop()


@pytest.mark.parametrize(("count", "losses"), [("num_idle_losses", MAX_IDLE_LOSSES), ("num_losses", MAX_LOSSES)])
async def test_what_no_replica_could_go_on_with_ends_as_lost(count: str, losses: int) -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        replica.hold()
        sink = RecordingSink()
        dispatcher.submit(make_request(range(20), 500), sink)
        await until(lambda: bool(dispatcher._flights.aboard))
        [flight] = dispatcher._flights.aboard
        setattr(flight, count, losses - 1)
        await replica.kill()
        await sink.wait()
        assert isinstance(sink.error, UnavailableError)
        assert sink.error.reason == Reason.REPLICA_LOST


def _have_gone_on(sinks: list[RecordingSink], counts: list[int]) -> bool:
    return all(sink.num_ends or sink.num_deliveries > count for sink, count in zip(sinks, counts, strict=True))


async def test_replicas_that_come_and_go_at_random_change_no_answer() -> None:
    rng = random.Random(5)
    replicas = [await Replica(f"r{number}", fake_step_s=0.001).start() for number in range(3)]
    async with cluster(times=LinkTimes(attach_s=2.0, min_backoff_s=0.01, max_backoff_s=0.05)) as dispatcher:
        dispatcher.update_replicas([replica.address for replica in replicas])
        requests = [make_request(make_prompt(rng, 30), rng.randint(1, 600), n=rng.choice([1, 1, 2])) for _ in range(40)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        for number in range(3, 9):
            counts = [sink.num_deliveries for sink in sinks]
            # Each has had a token since the last loss, else it might be taken for what kills replicas.
            await until(partial(_have_gone_on, sinks, counts))
            await replicas.pop(rng.randrange(3)).kill()
            replicas.append(await Replica(f"r{number}", fake_step_s=0.001).start())
            dispatcher.update_replicas([replica.address for replica in replicas])
            dispatcher.check_integrity()
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(30.0), request)
            assert len(sink.finishes) == request.n
        assert any(len(sink.decisions) > 1 for sink in sinks)
        await assert_idle(dispatcher, *replicas)
    for replica in replicas:
        await replica.stop()
