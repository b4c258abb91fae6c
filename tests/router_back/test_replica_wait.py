"""How long requests wait for the first replica."""

from __future__ import annotations

from router.replica_wait import ReplicaWait


def test_requests_wait_from_when_they_came_or_the_last_replica_went() -> None:
    wait = ReplicaWait(10.0, now=100.0)
    assert wait.next_event(None, 100.0) is None
    assert (wait.next_event(90.0, 100.0), wait.next_event(103.0, 103.0)) == (110.0, 113.0)
    assert (wait.overdue_since(109.0), wait.overdue_since(110.0)) == (None, 100.0)
    wait.see(110.0, has_replica=True)
    assert (wait.overdue_since(200.0), wait.next_event(90.0, 200.0)) == (None, None)
    wait.see(200.0, has_replica=False)
    wait.see(205.0, has_replica=False)
    assert (wait.overdue_since(209.0), wait.overdue_since(211.0)) == (None, 201.0)
    assert wait.next_event(150.0, 205.0) == 210.0
