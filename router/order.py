"""The order in which requests leave the queue, behind one small seam with two implementations. Pure.

`FairOrder`: priority, strictly (lower first); within a priority, requests that press, the least slack first; then
tenants in turn, by tokens. Why not simply by deadline: the default timeout gives every request one, which says nothing
of what its client expects, and whoever names the shortest would always go first. Why least slack: at overload, who is
served in the order of deadlines is served when it is too late, and all work is lost; slack counts what answers take.

While several tenants are served from a backlog, places are taken hardly faster than replicas give them back (`PACE`):
answers that begin together end together, and until then a newcomer would find no place, whatever its turn.

`ArrivalOrder`: first come, first served, whatever the priority, for comparison.
"""

from __future__ import annotations

from bisect import insort
from typing import Final, Protocol

from router.drain import Drain
from router.priority_class import PriorityClass
from router.queued import Queued
from router.removable_heap import RemovableHeap
from router.types import Request

PACE: Final = 1.2
"""Times the places that were taken per second of late, so that it can become more."""
SHARED_S: Final = 1.0
"""For how long places are paced after one tenant followed another; of backlog."""
QUANTUM_S: Final = 0.002
"""How much too early a place may be taken: at high rates several go together."""


class Order(Protocol):
    """`at`: seconds in which something was held back for lack of credit, so far; see `drain`."""

    def add(self, queued: Queued, at: float) -> None: ...

    def remove(self, queued: Queued, at: float) -> None:
        """`queued` does not wait any more; it did not go."""

    def next(self, now: float, at: float) -> Queued | None:
        """Return who goes next; None if nobody does, before `next_due`."""

    def next_due(self) -> float | None:
        """Return when, on the clock of `at`, somebody may go whom only the time keeps."""

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        """`queued` goes, and its tenant is charged. `is_held`: others had to be held back before."""

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        """Say whether `rider` may go right after one of the same priority and tenant that was just taken."""

    def check_integrity(self) -> None: ...


class FairOrder:
    def __init__(self) -> None:
        self._classes: dict[int, PriorityClass] = {}
        self._priorities: list[int] = []
        """Of all that ever waited, in order; a request's priority has bounds."""
        self._num_waiting = 0
        self._places = Drain()
        self._due = 0.0
        """When the next place may be taken; 0: at any time."""
        self._last_tenant = ""
        self._shared_until = 0.0

    def add(self, queued: Queued, at: float) -> None:
        priority = queued.request.priority
        if priority not in self._classes:
            self._classes[priority] = PriorityClass()
            insort(self._priorities, priority)
        self._classes[priority].add(queued, at)
        self._num_waiting += 1
        self._places.begin(at)

    def remove(self, queued: Queued, at: float) -> None:
        self._classes[queued.request.priority].remove(queued, at)
        self._left(at)

    def next(self, now: float, at: float) -> Queued | None:
        if self._due > at + QUANTUM_S:
            return None
        for priority in self._priorities:
            if self._classes[priority]:
                return self._classes[priority].next(now, at)
        return None

    def next_due(self) -> float | None:
        return self._due or None

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        self._classes[queued.request.priority].take(queued, at, is_held=is_held)
        if is_held:
            self._pace(queued.request, at)
        self._left(at)

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        return self._due <= at + QUANTUM_S and self._classes[rider.request.priority].may_ride(rider, now, at)

    def _pace(self, request: Request, at: float) -> None:
        self._places.sent(request.n, at)
        if request.tenant != self._last_tenant:
            self._last_tenant, self._shared_until = request.tenant, at + SHARED_S
        per_second = self._places.per_second(at)
        if per_second and at < self._shared_until:
            self._due = max(self._due, at) + request.n / (PACE * per_second)

    def _left(self, at: float) -> None:
        self._num_waiting -= 1
        if not self._num_waiting:
            self._places.end(at)
            self._due = 0.0

    def settle(self, priority: int, tenant: str, num_tokens: int) -> None:
        """What a tenant was charged with `take` was too little by so much; less than 0: too much."""
        self._classes[priority].settle(tenant, num_tokens)

    def shortfall_s(self, priority: int, tenant: str, cost: int, latest_start: float, now: float, at: float) -> float:
        """Return by how many seconds a new request, or one that waits, would start too late if it was taken on; not
        above 0: none, as far as known."""
        known = self._classes.get(priority)
        return 0.0 if known is None else known.shortfall_s(tenant, cost, latest_start, now, at)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        assert self._priorities == sorted(self._classes)
        assert self._num_waiting or not self._due
        for each in self._classes.values():
            each.check_integrity()


class ArrivalOrder:
    def __init__(self) -> None:
        self._waiting: dict[int, Queued] = {}
        self._arrivals = RemovableHeap()

    def add(self, queued: Queued, at: float) -> None:
        self._waiting[queued.key] = queued
        self._arrivals.push(queued.key, queued.request.accepted_at)

    def remove(self, queued: Queued, at: float) -> None:
        del self._waiting[queued.key]
        self._arrivals.discard(queued.key)

    def next(self, now: float, at: float) -> Queued | None:
        first = self._arrivals.first()
        return None if first is None else self._waiting[first[1]]

    def next_due(self) -> float | None:
        return None

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        self.remove(queued, at)

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        return False

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        assert len(self._arrivals) == len(self._waiting)
        self._arrivals.check_integrity()
