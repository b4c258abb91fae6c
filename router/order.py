"""The order in which requests leave the queue, behind one small seam with two implementations. Pure.

`FairOrder`: priority, strictly (lower first); within a priority, requests that press, the least slack first; then
tenants in turn, by tokens. Why not simply by deadline: the default timeout gives every request one, which says nothing
of what its client expects, and whoever names the shortest would always go first. Why least slack: at overload, who is
served in the order of deadlines is served when it is too late, and all work is lost; slack counts what answers take.

`ArrivalOrder`: first come, first served, whatever the priority, for comparison.
"""

from __future__ import annotations

from bisect import insort
from typing import Protocol

from router.filling import Filling
from router.priority_class import PriorityClass
from router.queued import Queued
from router.removable_heap import RemovableHeap


class Order(Protocol):
    """`at`: seconds in which something was held back for lack of credit, so far; see `drain`."""

    def add(self, queued: Queued, at: float) -> None: ...

    def remove(self, queued: Queued, at: float) -> None:
        """`queued` does not wait any more; it did not go."""

    def next(self, now: float, at: float, *, num_free: int, is_held: bool) -> Queued | None:
        """Return who goes next, of whom `num_free` could go; None if nobody waits, or nobody may go before `due`."""

    @property
    def due(self) -> float | None:
        """When somebody may go whom only the time keeps; None if there is nobody."""

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        """`queued` goes, and its tenant is charged. `is_held`: others had to be held back before."""

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        """Say whether `rider` may go right after one of the same priority and tenant that was just taken."""

    def may_pass(self, queued: Queued, now: float, at: float) -> bool:
        """Say whether `queued` may go instead of one of the same priority and tenant, whose turn it is."""

    def check_integrity(self) -> None: ...


class FairOrder:
    def __init__(self) -> None:
        self._classes: dict[int, PriorityClass] = {}
        self._priorities: list[int] = []
        """Of all that ever waited, in order; a request's priority has bounds."""
        self._filling = Filling()

    def add(self, queued: Queued, at: float) -> None:
        priority = queued.request.priority
        if priority not in self._classes:
            self._classes[priority] = PriorityClass()
            insort(self._priorities, priority)
        self._classes[priority].add(queued, at)

    def remove(self, queued: Queued, at: float) -> None:
        self._classes[queued.request.priority].remove(queued, at)

    def next(self, now: float, at: float, *, num_free: int, is_held: bool) -> Queued | None:
        self._filling.rest()

        def may_go(tenant: str) -> bool:
            return self._filling.may_go(tenant, now, num_free, is_held=is_held)

        for priority in self._priorities:
            queued = self._classes[priority].next(now, at, may_go)
            if queued is not None:
                return queued
        return None

    @property
    def due(self) -> float | None:
        return self._filling.due

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        self._classes[queued.request.priority].take(queued, at, is_held=is_held)
        self._filling.taken(queued.request.tenant, queued.request.n)

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        return self._classes[rider.request.priority].may_ride(rider, now, at)

    def may_pass(self, queued: Queued, now: float, at: float) -> bool:
        return self._classes[queued.request.priority].may_pass(queued, now, at)

    def answered(self, answer_s: float) -> None:
        """An answer took so long from when it went."""
        self._filling.answered(answer_s)

    @property
    def num_held(self) -> int:
        """Places that were taken and not left."""
        return self._filling.num_held

    def left(self, tenant: str, num_places: int) -> None:
        """What was taken for `tenant` is over, or did not go after all."""
        self._filling.left(tenant, num_places)

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

    def next(self, now: float, at: float, *, num_free: int, is_held: bool) -> Queued | None:
        first = self._arrivals.first()
        return None if first is None else self._waiting[first[1]]

    @property
    def due(self) -> float | None:
        return None

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        self.remove(queued, at)

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        return False

    def may_pass(self, queued: Queued, now: float, at: float) -> bool:
        return False

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        assert len(self._arrivals) == len(self._waiting)
        self._arrivals.check_integrity()
