"""What the router's back counts for the cluster's scaling, and how it waits for replicas that are to come."""

from __future__ import annotations

from dataclasses import replace

import pytest

from router.replica_wait import LOOK_AGAIN_S, ReplicaWait, is_expected, ready_in_s
from router.signal import ModelOutlook, StartingReplica
from router.token_rates import TokenRates
from router.traffic import Traffic
from router.types import ReplicaView
from workers.types import Load

OUTLOOK = ModelOutlook(target=0, min_replicas=0, max_replicas=3, reason="", decided_at=0.0)
STARTING = replace(OUTLOOK, starting=(StartingReplica(replica_id="r", stage="loading", since_s=1.0),))


def test_traffic_counts_what_replicas_have_had() -> None:
    traffic = Traffic()
    traffic.boarded(2, 10.0)
    traffic.boarded(1, 11.0)
    assert (traffic.num_running, traffic.running_s(12.0)) == (3, 5.0)
    traffic.left(2, 10.0, 14.0)
    assert (traffic.num_running, traffic.num_ended, traffic.served_s, traffic.running_s(14.0)) == (1, 2, 8.0, 3.0)
    traffic.recalled(1, 11.0)
    assert (traffic.num_running, traffic.num_ended, traffic.running_s(20.0)) == (0, 2, 0.0)


def view(num_tokens: int, *, replica: str = "a", epoch: int = 1) -> ReplicaView:
    load = Load(num_computed_tokens=num_tokens)
    return ReplicaView(replica_id=replica, model="toy", state="ready", epoch=epoch, load=load)


def test_token_rates_are_those_of_late() -> None:
    rates = TokenRates()
    assert rates.per_second("a") == 0
    rates.sample([view(1_000)], 10.0)
    assert rates.per_second("a") == 0
    rates.sample([view(1_050), view(9, replica="b")], 10.5)
    assert (rates.per_second("a"), rates.per_second("b")) == (100, 0)
    for step in range(1, 9):
        rates.sample([view(1_050 + 5 * step)], 10.5 + 0.5 * step)
    assert rates.per_second("a") == 10
    assert rates.per_second("b") == 0
    rates.sample([view(7, epoch=2)], 15.0)
    assert rates.per_second("a") == 0


def test_requests_wait_inside_their_deadlines_for_a_replica_that_is_expected() -> None:
    wait = ReplicaWait(10.0, now=100.0)
    wait.see(100.0, has_replica=False, outlook=STARTING)
    assert (wait.overdue_since(10_000.0), wait.next_event(100.0, 100.0)) == (None, 100.0 + LOOK_AGAIN_S)
    assert wait.next_event(None, 100.0) is None
    wait.see(200.0, has_replica=False, outlook=replace(STARTING, failure="no memory"))
    assert (wait.overdue_since(209.0), wait.next_event(100.0, 200.0)) == (None, 210.0)
    assert wait.overdue_since(210.0) == 200.0
    wait.see(220.0, has_replica=True, outlook=None)
    assert (wait.overdue_since(10_000.0), wait.next_event(100.0, 220.0)) == (None, None)


@pytest.mark.parametrize(
    ("outlook", "expected", "known_s"),
    [
        (None, False, None),
        (OUTLOOK, True, None),
        (replace(OUTLOOK, max_replicas=0), False, None),
        (replace(OUTLOOK, min_replicas=3, target=3), False, None),
        (replace(STARTING, max_replicas=0), True, None),
        (replace(OUTLOOK, failure="no memory"), False, None),
        (replace(OUTLOOK, start_s=4.0), True, 4.0),
        (replace(OUTLOOK, start_s=4.0, ready_in_s=1.5), True, 1.5),
    ],
)
def test_what_is_expected(outlook: ModelOutlook | None, expected: bool, known_s: float | None) -> None:
    assert is_expected(outlook) is expected
    assert ready_in_s(outlook) == known_s
