"""Requests through the router's back, over real gRPC, to fake engines: tokens, cancels, deadlines, losses, drains."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from router.decision_log import read_decision
from tests.data_plane.rig import (
    KEYS,
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
from workers.data_plane import DataPlaneServer
from workers.errors import (
    CancelledRequestError,
    DeadlineError,
    InvalidRequestError,
    OctavoError,
    OverloadedError,
    UnavailableError,
)
from workers.fake import fake_continuation, fake_next_token


async def test_answers_are_the_engines_token_for_token() -> None:
    rng = random.Random(1)
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two) as dispatcher:
        requests = [make_request(make_prompt(rng, rng.randrange(1, 100)), rng.randrange(1, 40)) for _ in range(60)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
            assert len(sink.decisions) == 1
            assert sink.cached_tokens is not None
        assert {sink.decisions[0].replica for sink in sinks} == {"one", "two"}
        await assert_idle(dispatcher, one, two)


async def test_a_repeated_prompt_is_placed_where_it_is_cached() -> None:
    prompt = make_prompt(random.Random(2), 41)
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two) as dispatcher:
        await until(lambda: all(view.state == "ready" for view in dispatcher.replicas()))
        first = RecordingSink()
        dispatcher.submit(make_request(prompt), first)
        await first.wait()
        home = first.decisions[0].replica
        await until(lambda: len(dispatcher._fleet._present[home].state.resident) >= 10)
        for _ in range(5):
            sink = RecordingSink()
            dispatcher.submit(make_request(prompt), sink)
            await sink.wait()
            assert sink.decisions[0].replica == home
            assert sink.decisions[0].rule == "prefix"
            assert sink.decisions[0].matched_tokens == sink.cached_tokens == 40


async def test_a_replica_tells_how_many_of_its_guesses_were_right() -> None:
    """The prompt ends as it began, and the engine happens to go on as the prompt did there."""
    prompts = ([5, 6, follower, filler, 5, 6] for filler in range(100) for follower in range(VOCAB))
    prompt = next(prompt for prompt in prompts if fake_next_token(prompt, VOCAB) == prompt[2])
    replica = Replica("one", lookup_tokens=3)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(prompt, 60), RecordingSink()
        dispatcher.submit(request, sink)
        assert_answers(await sink.wait(), request)
        await until(lambda: dispatcher.replicas()[0].load == replica.engine.load())
        load = dispatcher.replicas()[0].load
        assert load.num_drafted_tokens > load.num_accepted_tokens > 0


async def test_cancel_ends_at_once_and_frees_blocks() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        cancel = dispatcher.submit(make_request(range(30), 500), sink)
        await until(lambda: len(sink.token_ids) > 3)
        cancel()
        assert isinstance(sink.error, CancelledRequestError)
        cancel()
        await assert_idle(dispatcher, replica)


async def test_a_sink_may_cancel_while_it_is_given_tokens() -> None:
    """As the front does when it finds a stop string; the finish in the same message must not count any more."""
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        cancel = dispatcher.submit(make_request(range(30), 1), sink)
        sink.on_tokens = cancel
        await sink.wait()
        assert isinstance(sink.error, CancelledRequestError)
        assert len(sink.token_ids) == 1
        await assert_idle(dispatcher, replica)


async def test_every_choice_is_delivered_and_counted() -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(30), 12, n=3), RecordingSink()
        dispatcher.submit(request, sink)
        await sink.wait()
        expected = fake_continuation(request.prompt, 12, VOCAB)
        assert sink.answers == dict.fromkeys(range(3), expected)
        assert set(sink.finishes) == {0, 1, 2}
        assert replica.thread.load().num_computed_tokens < 30 + 3 * 13, "the prompt is computed once"
        await assert_idle(dispatcher, replica)


async def test_a_choice_that_nobody_wants_ends_alone() -> None:
    """As when the front has found a stop string in it: it takes no more steps, and the others are whole."""
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(30), 80, n=3), RecordingSink()
        cancel = dispatcher.submit(request, sink)

        def on_tokens() -> None:
            if len(sink.answers.get(1, ())) >= 5 and not sink.not_wanted:
                sink.not_wanted.add(1)
                cancel(1)
                cancel(1)

        sink.on_tokens = on_tokens
        await until(lambda: 1 in sink.not_wanted)
        await until(lambda: replica.thread.load().num_running == 2)
        await sink.wait()
        expected = fake_continuation(request.prompt, 80, VOCAB)
        cut = sink.answers[1]
        assert sink.answers == {0: expected, 1: expected[: len(cut)], 2: expected}
        assert 5 <= len(cut) < 80
        assert (sink.error, set(sink.finishes)) == (None, {0, 2})
        cancel(0)
        await assert_idle(dispatcher, replica)


async def test_a_choice_that_is_cancelled_in_the_queue_never_comes() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster() as dispatcher:
        request, sink = make_request(range(30), 30, n=2), RecordingSink()
        cancel = dispatcher.submit(request, sink)
        sink.not_wanted.add(0)
        cancel(0)
        await replica.start()
        dispatcher.update_replicas([replica.address])
        await sink.wait()
        assert sink.answers == {0: [], 1: fake_continuation(request.prompt, 30, VOCAB)}
        await assert_idle(dispatcher, replica)
    await replica.stop()


async def test_choices_that_are_cancelled_one_by_one_end_the_request_well() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        cancel = dispatcher.submit(make_request(range(30), 500, n=2), sink)
        await until(lambda: len(sink.answers) == 2)
        for index in (1, 0):
            sink.not_wanted.add(index)
            cancel(index)
        assert (sink.num_ends, sink.error) == (1, None)
        cancel()
        await assert_idle(dispatcher, replica)


async def test_a_deadline_or_a_cancel_ends_all_choices() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        late, cancelled = RecordingSink(), RecordingSink()
        dispatcher.submit(make_request(range(30), 900, n=4, timeout_s=0.1), late)
        cancel = dispatcher.submit(make_request(range(30), 900, n=4), cancelled)
        assert isinstance((await late.wait()).error, DeadlineError)
        await until(lambda: len(cancelled.answers) == 4)
        cancel()
        assert isinstance(cancelled.error, CancelledRequestError)
        await assert_idle(dispatcher, replica)


async def test_cancel_in_the_queue() -> None:
    async with cluster() as dispatcher:
        sink = RecordingSink()
        cancel = dispatcher.submit(make_request(range(30)), sink)
        assert dispatcher.backlog().num_queued_tokens == 30
        cancel()
        assert isinstance(sink.error, CancelledRequestError)
        assert sink.decisions == []


async def test_a_deadline_in_the_queue_is_kept() -> None:
    async with cluster() as dispatcher:
        sinks = [RecordingSink() for _ in range(3)]
        for timeout_s, sink in zip((0.15, 0.05, 0.1), sinks, strict=True):
            dispatcher.submit(make_request(range(30), timeout_s=timeout_s), sink)
        for sink in sinks:
            assert isinstance((await sink.wait(1.0)).error, DeadlineError)
            assert sink.decisions == []


async def test_a_deadline_that_is_past_is_never_dispatched() -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        await until(lambda: dispatcher.replicas()[0].state == "ready")
        sink = RecordingSink()
        dispatcher.submit(make_request(range(30), timeout_s=-1.0), sink)
        assert isinstance((await sink.wait()).error, DeadlineError)
        assert sink.decisions == []
        assert replica.thread.load().num_computed_tokens == 0


async def test_a_deadline_in_the_middle_of_an_answer_is_kept() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(30), 900, timeout_s=0.2), sink)
        assert isinstance((await sink.wait()).error, DeadlineError)
        assert 0 < len(sink.token_ids) < 900
        await assert_idle(dispatcher, replica)


async def test_the_engine_keeps_a_deadline_by_itself() -> None:
    """Not only the router's timer: the replica is told what is left."""
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(30), 900, timeout_s=0.2), sink)
        await until(lambda: bool(dispatcher._flights.aboard))
        [flight] = dispatcher._flights.aboard
        dispatcher._flights._deadlines.discard(flight.work_id)
        dispatcher._flights._deadlines.push(flight.work_id, float("inf"))
        assert isinstance((await sink.wait()).error, DeadlineError)


def was_sent(sink: RecordingSink, times: int) -> bool:
    return len(sink.decisions) == times


async def test_a_request_that_loses_every_replica_is_given_up() -> None:
    async with cluster() as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(20)), sink)
        for number in range(1, 4):
            replica = await Replica(f"replica-{number}", fake_step_s=0.1).start()
            dispatcher.update_replicas([replica.address])
            await until(partial(was_sent, sink, number))
            await replica.kill()
        await sink.wait()
        assert isinstance(sink.error, UnavailableError)
        assert sink.error.reason == Reason.REPLICA_LOST
        assert sink.token_ids == []


async def test_a_replica_that_ends_every_work_at_once_is_given_up_as_well() -> None:
    """Its engine has stopped, but its streams live: with the least load of all it was sent the request for ever."""
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        replica.thread.close()
        sink = RecordingSink()
        dispatcher.submit(make_request(range(20)), sink)
        await sink.wait()
        assert isinstance(sink.error, UnavailableError)
        assert sink.error.reason == Reason.REPLICA_LOST
        assert [decision.attempt for decision in sink.decisions] == [1, 2, 3]


async def test_a_broken_stream_is_attached_again() -> None:
    """The replica is well, only the connection broke: its works are aborted there, and sent again."""
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(30), 500), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        port = int(replica.server.address.rpartition(":")[2])
        await replica.server.stop(0.0)
        replica.server = await _server_again(replica, port)
        assert_answers(await sink.wait(), request)
        assert [decision.replica for decision in sink.decisions] == ["one", "one"]
        await assert_idle(dispatcher, replica)


async def _server_again(replica: Replica, port: int) -> DataPlaneServer:
    """Another server over the same engine, at the same port."""
    server = DataPlaneServer(replica_id=replica.replica_id, key=KEYS.data_plane, port=port)
    replica.thread._notify = server.notify
    await server.start(replica.thread)
    return server


async def test_drain_of_a_replica_finishes_what_runs_and_takes_nothing_new() -> None:
    one, two = Replica("one", fake_step_s=0.002), Replica("two", fake_step_s=0.002)
    async with cluster(one) as dispatcher:
        running = make_request(range(20), 60)
        sink = RecordingSink()
        dispatcher.submit(running, sink)
        await until(lambda: bool(sink.token_ids))
        await two.start()
        dispatcher.update_replicas([one.address, two.address])
        draining = asyncio.create_task(one.server.drain(5.0))
        await until(lambda: dispatcher.replicas()[0].state == "draining")
        late = [make_request(range(i, 20 + i)) for i in range(8)]
        late_sinks = [RecordingSink() for _ in late]
        for request, late_sink in zip(late, late_sinks, strict=True):
            dispatcher.submit(request, late_sink)
        for request, late_sink in zip(late, late_sinks, strict=True):
            assert_answers(await late_sink.wait(), request)
            assert late_sink.decisions[0].replica == "two"
        assert await draining
        assert_answers(await sink.wait(), running)
        dispatcher.update_replicas([two.address])
    await two.stop()


async def test_work_that_crosses_the_announcement_of_a_drain_is_placed_again() -> None:
    one, two = Replica("one"), Replica("two")
    async with cluster(one) as dispatcher:
        await until(lambda: dispatcher.replicas()[0].state == "ready")
        one.server._ledger.is_draining = True  # and the router has not heard of it
        request, sink = make_request(range(20)), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: len(sink.decisions) == 1)
        await two.start()
        dispatcher.update_replicas([two.address])
        assert_answers(await sink.wait(), request)
        assert sink.decisions[-1].replica == "two"
        assert sink.decisions[-1].attempt == len(sink.decisions) > 1
    await two.stop()


async def test_a_replica_that_leaves_the_set_finishes_its_work_and_is_let_go() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(20), 50), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        dispatcher.update_replicas([])
        assert [view.state for view in dispatcher.replicas()] == ["draining"]
        assert_answers(await sink.wait(), request)
        await until(lambda: not dispatcher.replicas() and replica.server.num_routers == 0)


async def test_a_burst_waits_for_the_first_replica() -> None:
    replica = Replica("one")
    async with cluster() as dispatcher:
        requests = [make_request(range(i, i + 10)) for i in range(100)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        await asyncio.sleep(0.05)
        assert dispatcher.backlog().num_queued_requests == 100
        await replica.start()
        dispatcher.update_replicas([replica.address])
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
        await assert_idle(dispatcher, replica)
    await replica.stop()


async def test_without_a_replica_requests_wait_so_long_and_no_longer() -> None:
    async with cluster(no_replica_wait_s=0.1) as dispatcher:
        sinks = [RecordingSink() for _ in range(2)]
        dispatcher.submit(make_request(range(10)), sinks[0])
        await asyncio.sleep(0.06)
        dispatcher.submit(make_request(range(10)), sinks[1])
        await sinks[0].wait(1.0)
        assert not sinks[1].done.is_set()
        await sinks[1].wait(1.0)
        for sink in sinks:
            assert isinstance(sink.error, UnavailableError)
            assert sink.error.reason == Reason.NO_REPLICA


async def test_a_draining_router_refuses_and_waits() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(10), 30), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(sink.token_ids))
        draining = asyncio.create_task(dispatcher.drain(5.0))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError) as refusal:
            dispatcher.submit(make_request(range(10)), RecordingSink())
        assert refusal.value.reason == Reason.DRAINING
        assert await draining
        assert_answers(sink, request)
        assert await dispatcher.drain(0.0)


async def test_stop_ends_what_a_drain_left() -> None:
    replica = Replica("one", fake_step_s=0.01)
    async with cluster(replica) as dispatcher:
        sinks = [RecordingSink() for _ in range(3)]
        for sink in sinks:
            dispatcher.submit(make_request(range(10), 900), sink)
        assert not await dispatcher.drain(0.05)
        await dispatcher.stop()
        for sink in sinks:
            assert isinstance(sink.error, UnavailableError)
            assert sink.error.reason == Reason.DRAINING
        await until(lambda: replica.server.num_works == 0)


async def test_more_than_the_backlog_is_refused_with_the_numbers() -> None:
    async with cluster(max_queued_tokens=100) as dispatcher:
        cancels = [dispatcher.submit(make_request(range(40)), RecordingSink()) for _ in range(2)]
        with pytest.raises(OverloadedError, match="2 requests with 80 tokens") as refusal:
            dispatcher.submit(make_request(range(40)), RecordingSink())
        assert refusal.value.reason == Reason.QUEUE_FULL
        assert refusal.value.retry_after_s is not None
        cancels.pop()()
        cancels.append(dispatcher.submit(make_request(range(40)), RecordingSink()))
        for cancel in cancels:
            cancel()


async def test_what_the_engine_refuses_is_the_requests_error() -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(900), 900), sink)
        await sink.wait()
        assert isinstance(sink.error, InvalidRequestError)
        assert sink.error.reason == Reason.PROMPT_TOO_LONG
        await assert_idle(dispatcher, replica)


async def test_priority_goes_first_when_there_is_a_queue() -> None:
    replica = Replica("one", max_num_sequences=1)
    async with cluster() as dispatcher:
        order: list[int] = []
        sinks = []
        for priority in (5, 3, 5, 0, 4, 1):
            sink = RecordingSink()
            sink.on_tokens = partial(order.append, priority)
            dispatcher.submit(make_request(range(64), 1, priority=priority), sink)
            sinks.append(sink)
        await replica.start()
        dispatcher.update_replicas([replica.address])
        for sink in sinks:
            await sink.wait()
        assert order == sorted(order)
    await replica.stop()


async def test_an_attempt_that_is_over_is_not_heard() -> None:
    """Fencing: what a replica says of a work that the router took away from it changes nothing."""
    replica = Replica("one", fake_step_s=0.05)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(10), 3), RecordingSink()
        dispatcher.submit(request, sink)
        await until(lambda: bool(dispatcher._flights.aboard))
        link = dispatcher._fleet._present["one"]
        [flight] = dispatcher._flights.aboard
        late = pb.WorkDelta(work_id=flight.work_id, token_ids=[1, 2, 3], finish=pb.Finish(reason="length"))
        tokens = pb.WorkTokens(work_ids=[flight.work_id], num_tokens=[2], token_ids=[8, 9])
        dispatcher._lose(flight, "taken away", Reason.REPLICA_LOST)
        dispatcher.link_delivered(link, pb.StepBatch(deltas=[late], tokens=tokens))
        assert sink.token_ids == []
        assert_answers(await sink.wait(), request)
        assert [decision.attempt for decision in sink.decisions] == [1, 2]


@pytest.mark.parametrize("fate", ["deadline", "no replica", "lost"])
async def test_a_sink_may_cancel_its_neighbours_when_it_ends(fate: str) -> None:
    """As a broken Session does. The neighbours are ending for the same reason at the same moment."""
    replica = Replica("one", fake_step_s=0.1)
    wait_s = 0.05 if fate == "no replica" else 30.0  # to attach may take longer than the one
    async with cluster(*([replica] if fate == "lost" else []), no_replica_wait_s=wait_s) as dispatcher:
        cancels: list[Callable[[], None]] = []
        sinks = [Cancelling(cancels) for _ in range(3)]
        for sink in sinks:
            request = make_request(range(10), timeout_s=0.02 if fate == "deadline" else 30.0)
            cancels.append(dispatcher.submit(request, sink))
        if fate == "lost":
            await until(lambda: all(sink.decisions for sink in sinks))
            for flight in dispatcher._flights:
                flight.num_idle_losses = 2
            await replica.kill()
        for sink in sinks:
            await sink.wait()
        assert [type(sink.error).__name__ for sink in sinks].count("CancelledRequestError") == 2
        dispatcher.check_integrity()


class Cancelling(RecordingSink):
    """Cancels everything when it ends."""

    def __init__(self, cancels: list[Callable[[], None]]) -> None:
        super().__init__()
        self._cancels = cancels

    def ended(self, error: OctavoError | None) -> None:
        super().ended(error)
        for cancel in self._cancels:
            cancel()


async def test_decisions_go_to_a_file_that_is_whole_when_the_router_has_stopped(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two, decision_log=str(path)) as dispatcher:
        sinks = [RecordingSink() for _ in range(20)]
        for sink in sinks:
            dispatcher.submit(make_request(range(30)), sink)
        for sink in sinks:
            await sink.wait()
    read = [read_decision(line) for line in path.read_text().splitlines()]
    assert [decision for decision, _ in filter(None, read)] == [sink.decisions[0] for sink in sinks], (
        "in the order in which they were made"
    )
