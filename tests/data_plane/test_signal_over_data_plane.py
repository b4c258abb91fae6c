"""What a router's back says of one model, before real data ports; and who waits for replicas that are to come."""

from __future__ import annotations

from dataclasses import replace

import pytest
from octavo.names import Reason

from router.signal import ModelOutlook, ModelSignal, StartingReplica
from tests.data_plane.rig import ROUTER, RecordingSink, Replica, make_dispatcher, make_request, until
from workers.errors import DeadlineError, OverloadedError, UnavailableError

START = (StartingReplica(replica_id="r", stage="loading", since_s=1.0),)


def outlook(*, ready_in_s: float | None = None, failure: str = "") -> ModelOutlook:
    return ModelOutlook(
        target=1,
        min_replicas=0,
        max_replicas=3,
        reason="",
        decided_at=0.0,
        ready_in_s=ready_in_s,
        starting=START,
        failure=failure,
    )


async def test_what_waits_runs_has_ended_and_was_turned_away() -> None:
    dispatcher = make_dispatcher(max_queued_requests=3)
    dispatcher.start()
    sinks = [RecordingSink() for _ in range(2)]
    dispatcher.submit(make_request([1, 2, 3], 4), sinks[0])
    dispatcher.submit(make_request([1, 2], 4, n=2), sinks[1])
    with pytest.raises(OverloadedError):
        dispatcher.submit(make_request([1], 4), RecordingSink())
    signal = dispatcher.signal("toy")
    assert signal.oldest_wait_s > 0
    counts = (signal.num_queued, signal.queued_tokens, signal.num_arrived_total, signal.num_turned_away_total)
    assert counts == (3, 5, 4, 1)
    assert (signal.num_running, signal.num_aboard, signal.num_ready, signal.num_ended_total) == (0, 0, 0, 0)
    replica = await Replica("one", fake_step_s=0.01).start()
    replica.hold()
    dispatcher.update_replicas([replica.address])
    await until(lambda: dispatcher.signal("toy").num_running == 3)
    signal = dispatcher.signal("toy")
    assert (signal.num_queued, signal.num_aboard, signal.num_ready, signal.oldest_wait_s) == (0, 3, 1, 0.0)
    assert signal.running_s > 0
    replica.go_on()
    for sink in sinks:
        await sink.wait()
    await until(lambda: dispatcher.signal("toy").num_aboard == 0)
    signal = dispatcher.signal("toy")
    assert (signal.num_running, signal.num_ended_total, signal.num_arrived_total) == (0, 3, 4)
    assert signal.served_s_total >= 3 * 4 * 0.01
    dispatcher.check_integrity()
    await dispatcher.stop()
    await replica.stop()


async def test_what_another_router_has_there_counts_as_aboard() -> None:
    replica = await Replica("one", fake_step_s=0.02).start()
    mine, other = make_dispatcher(), make_dispatcher(identity=replace(ROUTER, router_id="other"))
    for each in (mine, other):
        each.start()
        each.update_replicas([replica.address])
    sink = RecordingSink()
    other.submit(make_request([1, 2, 3], 50), sink)
    await until(lambda: mine.signal("toy").num_aboard == 1)
    assert mine.signal("toy").num_running == 0
    await sink.wait()
    for each in (mine, other):
        await each.stop()
    await replica.stop()


async def test_who_cannot_wait_for_the_next_replica_is_refused_at_once() -> None:
    dispatcher = make_dispatcher()
    dispatcher.look_out(lambda: outlook(ready_in_s=5.0))
    dispatcher.start()
    with pytest.raises(UnavailableError) as refusal:
        dispatcher.submit(make_request([1], 4, timeout_s=4.0), RecordingSink())
    assert (refusal.value.reason, refusal.value.retry_after_s) == (Reason.NO_REPLICA, 5.0)
    assert dispatcher.signal("toy") == ModelSignal(num_arrived_total=1, num_turned_away_total=1)
    patient = RecordingSink()
    dispatcher.submit(make_request([1], 4, timeout_s=30.0), patient)
    replica = await Replica("one").start()
    dispatcher.update_replicas([replica.address])
    await patient.wait()
    assert patient.error is None
    dispatcher.submit(make_request([1], 4, timeout_s=4.0), quick := RecordingSink())
    await quick.wait()
    assert quick.error is None
    await dispatcher.stop()
    await replica.stop()


async def test_requests_wait_inside_their_deadlines_while_a_replica_starts() -> None:
    """Longer than they would for nobody; when the start fails, for no longer than that."""
    dispatcher = make_dispatcher(no_replica_wait_s=0.1)
    said = [outlook()]
    dispatcher.look_out(lambda: said[0])
    dispatcher.start()
    first, second = RecordingSink(), RecordingSink()
    dispatcher.submit(make_request([1], 4, timeout_s=0.6), first)
    dispatcher.submit(make_request([1], 4, timeout_s=30.0), second)
    await first.wait()
    assert isinstance(first.error, DeadlineError)
    assert second.num_ends == 0
    said[0] = outlook(failure="no memory")
    await second.wait()
    assert isinstance(second.error, UnavailableError)
    assert dispatcher.signal("toy").num_turned_away_total == 2
    await dispatcher.stop()
