"""Answers that nobody wants any more, of which nobody wants a choice, or that come too late."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.data_plane.rig import (
    VOCAB,
    RecordingSink,
    Replica,
    assert_idle,
    cluster,
    make_request,
    ready_cluster,
    until,
)
from workers.errors import CancelledRequestError, DeadlineError, OctavoError
from workers.fake import fake_continuation


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


async def test_a_choice_that_nobody_wants_ends_alone() -> None:
    """As when the front has found a stop string in it: it takes no more steps, and the others are whole."""
    replica = Replica("one", fake_step_s=0.002)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(30), 300, n=3), RecordingSink()
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
        expected = fake_continuation(request.prompt, 300, VOCAB)
        cut = sink.answers[1]
        assert sink.answers == {0: expected, 1: expected[: len(cut)], 2: expected}
        assert 5 <= len(cut) < 300
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
            assert isinstance((await sink.wait()).error, DeadlineError)
            assert sink.decisions == []


async def test_a_deadline_that_is_past_is_never_dispatched() -> None:
    replica = Replica("one")
    async with ready_cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(30), timeout_s=-1.0), sink)
        assert isinstance((await sink.wait()).error, DeadlineError)
        assert sink.decisions == []
        assert replica.thread.load().num_computed_tokens == 0


async def test_a_deadline_in_the_middle_of_an_answer_is_kept() -> None:
    replica = Replica("one", fake_step_s=0.002)
    async with ready_cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(30), 900, timeout_s=1.0), sink)
        assert isinstance((await sink.wait()).error, DeadlineError)
        assert 0 < len(sink.token_ids) < 900
        await assert_idle(dispatcher, replica)


async def test_the_engine_keeps_a_deadline_by_itself() -> None:
    """Not only the router's timer: the replica is told what is left."""
    replica = Replica("one", fake_step_s=0.002)
    async with ready_cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(30), 900, timeout_s=1.0), sink)
        await until(lambda: bool(dispatcher._flights.aboard))
        [flight] = dispatcher._flights.aboard
        dispatcher._flights._deadlines.discard(flight.work_id)
        dispatcher._flights._deadlines.push(flight.work_id, float("inf"))
        assert isinstance((await sink.wait()).error, DeadlineError)


@pytest.mark.parametrize("fate", ["deadline", "no replica", "lost"])
async def test_a_sink_may_cancel_its_neighbours_when_it_ends(fate: str) -> None:
    """As a broken Session does. The neighbours are ending for the same reason at the same moment."""
    replica = Replica("one")
    wait_s = 0.05 if fate == "no replica" else 30.0  # to attach may take longer than the one
    async with cluster(*([replica] if fate == "lost" else []), no_replica_wait_s=wait_s) as dispatcher:
        cancels: list[Callable[[], None]] = []
        sinks = [Cancelling(cancels) for _ in range(3)]
        replica.hold()
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
