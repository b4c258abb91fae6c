"""What waits at one priority: tenants that share what replicas can do, token by token. Pure.

Start-time fair queueing (Goyal, Vin, Cheng 1996): each tenant has a clock that its requests move on by their cost, and
the tenant whose clock is least goes next. `now_served` is the clock of the last one that went in its turn. A tenant
that comes back from an absence starts there: who was idle has saved nothing up.

A request that presses (`tenant_queue`) goes out of turn, the least slack of all tenants first. It costs its tenant as
much as in its turn, and only a tenant that is less than `ADVANCE_S` of everybody's throughput ahead may do it. So
deadlines bring nobody more than their share, but that much of it early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from router.drain import Drain
from router.queued import Queued
from router.removable_heap import RemovableHeap
from router.tenant_queue import TenantQueue

ADVANCE_S: Final = 0.05
MAX_ABSENT: Final = 4_096
"""Tenants of which nothing waits and whose clocks are remembered, since they are ahead."""


class PriorityClass:
    """Times called `at` are seconds of backlog, None while nothing is held back (see `drain`)."""

    def __init__(self) -> None:
        self.now_served = 0.0
        self._drain = Drain()
        self._tenants: dict[str, TenantQueue] = {}
        """Those of which something waits, and those in `_absent`."""
        self._numbers: dict[int, TenantQueue] = {}
        self._last_number = 0
        self._turns = RemovableHeap()
        """Tenants of which something waits, by their clocks."""
        self._slacks = RemovableHeap()
        """Of these, those that may go out of turn, by their latest starts."""
        self._barred = RemovableHeap()
        """Those that may not, by their clocks."""
        self._absent = RemovableHeap()
        """Tenants of which nothing waits, by their clocks, which are ahead of `now_served`."""

    def __bool__(self) -> bool:
        return bool(self._turns)

    def add(self, queued: Queued, at: float) -> None:
        name = queued.request.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            self._last_number += 1
            tenant = self._tenants[name] = TenantQueue(name, self._last_number, self.now_served)
            self._numbers[tenant.number] = tenant
        if not tenant:
            tenant.clock = max(tenant.clock, self.now_served)
        tenant.add(queued)
        tenant.drain.begin(at)
        self._drain.begin(at)
        self._file(tenant)

    def remove(self, queued: Queued, at: float) -> None:
        tenant = self._tenants[queued.request.tenant]
        tenant.remove(queued.key)
        if not tenant:
            tenant.drain.end(at)
        self._file(tenant)
        if not self._turns:
            # The end of a busy period: nobody competes with anybody, and all begin anew.
            self._drain.end(at)
            self.now_served = max((t.clock for t in self._tenants.values()), default=self.now_served)
            for each in list(self._tenants.values()):
                self._forget(each)

    def next(self, now: float, at: float, may_go: Callable[[str], bool]) -> Queued | None:
        """Return who goes next of those tenants that may."""
        passed: list[TenantQueue] = []
        queued = None
        while self._turns and queued is None:
            tenant = self._choose(now, at)
            if may_go(tenant.tenant):
                queued = tenant.next(now, self._horizon_s(tenant, at))
            else:
                passed.append(tenant)
                self._turns.discard(tenant.number)
                self._slacks.discard(tenant.number)
        for tenant in passed:
            self._file(tenant)
        return queued

    def _choose(self, now: float, at: float) -> TenantQueue:
        """Return whose turn it is. There is somebody."""
        while (barred := self._barred.first()) is not None and barred[0] <= self._limit(at):
            self._barred.discard(barred[1])
            if barred[1] in self._turns:
                self._slacks.push(barred[1], self._numbers[barred[1]].latest_start)
        while (pressing := self._slacks.first()) is not None:
            tenant = self._numbers[pressing[1]]
            if not tenant.presses(now, self._horizon_s(tenant, at)):
                break
            if tenant.clock <= self._limit(at):
                return tenant
            self._slacks.discard(tenant.number)
            self._barred.push(tenant.number, tenant.clock)
        return self._in_turn()

    def take(self, queued: Queued, at: float, *, is_held: bool) -> None:
        """`queued` goes; `is_held`: from a backlog."""
        tenant = self._tenants[queued.request.tenant]
        if tenant is self._in_turn():
            self.now_served = max(self.now_served, tenant.clock)
            while (absent := self._absent.first()) is not None and absent[0] <= self.now_served:
                self._forget(self._numbers[absent[1]])
        if is_held:
            tenant.drain.sent(queued.cost, at)
            self._drain.sent(queued.cost, at)
        tenant.clock += queued.cost
        self.remove(queued, at)
        tenant.went(queued)

    def may_ride(self, rider: Queued, now: float, at: float) -> bool:
        """Say whether `rider` may go together with one that was just taken, before its own turn: not while somebody
        presses who is pushed back by that, nor if its tenant is too far ahead of others."""
        tenant = self._tenants[rider.request.tenant]
        if len(self._turns) > 1 and tenant.clock > self._limit(at):
            return False
        pressing = self._slacks.first()
        if pressing is None:
            return True
        first = self._numbers[pressing[1]]
        return not first.presses(now, self._horizon_s(first, at)) or rider.latest_start <= now + self._horizon_s(
            tenant, at
        )

    def may_pass(self, queued: Queued, now: float, at: float) -> bool:
        """Say whether `queued` may go instead of one of its tenant, whose turn it is: while none of theirs presses."""
        tenant = self._tenants[queued.request.tenant]
        return not tenant.presses(now, self._horizon_s(tenant, at))

    def settle(self, tenant_name: str, num_tokens: int) -> None:
        """Correct what a tenant was charged."""
        tenant = self._tenants.get(tenant_name)
        if tenant is not None:
            tenant.clock += num_tokens
            self._file(tenant)

    def shortfall_s(self, tenant_name: str, cost: int, latest_start: float, now: float, at: float) -> float:
        """Return by how much a new request, or one before it, would start too late; see `TenantQueue.shortfall_s`.
        Not above 0 as long as nobody knows how fast the queue empties."""
        tenant = self._tenants.get(tenant_name)
        rate = None if tenant is None else self._rate(tenant, at)
        return 0.0 if tenant is None or not rate else tenant.shortfall_s(cost, latest_start, now, rate)

    def _rate(self, tenant: TenantQueue, at: float) -> float | None:
        """Return how fast this tenant's queue empties, in tokens per second: at least its fair share."""
        everybody = self._drain.per_second(at)
        if everybody is None:
            return None
        return max(tenant.drain.per_second(at) or 0.0, everybody / max(len(self._turns), 1))

    def _horizon_s(self, tenant: TenantQueue, at: float) -> float:
        """Return how long all takes that this tenant has waiting; infinite while nobody knows."""
        rate = self._rate(tenant, at)
        return tenant.cost / rate if rate else math.inf

    def _limit(self, at: float) -> float:
        """Return how far a clock may be for going out of turn."""
        return self.now_served + ADVANCE_S * (self._drain.per_second(at) or 0.0)

    def _in_turn(self) -> TenantQueue:
        first = self._turns.first()
        assert first is not None
        return self._numbers[first[1]]

    def _file(self, tenant: TenantQueue) -> None:
        """Put a tenant where it belongs now."""
        number = tenant.number
        for heap in (self._turns, self._slacks, self._barred, self._absent):
            heap.discard(number)
        if tenant:
            self._turns.push(number, tenant.clock)
            if tenant.latest_start < math.inf:
                self._slacks.push(number, tenant.latest_start)
        elif tenant.clock > self.now_served:
            self._absent.push(number, tenant.clock)
            if len(self._absent) > MAX_ABSENT:
                least = self._absent.first()
                assert least is not None
                self._forget(self._numbers[least[1]])
        else:
            self._forget(tenant)

    def _forget(self, tenant: TenantQueue) -> None:
        assert not tenant
        self._absent.discard(tenant.number)
        del self._tenants[tenant.tenant]
        del self._numbers[tenant.number]

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        assert len(self._tenants) == len(self._numbers) == len(self._turns) + len(self._absent)
        assert len(self._absent) <= MAX_ABSENT
        assert self._turns or not self._tenants, "nobody is remembered when nothing waits"
        for name, tenant in self._tenants.items():
            tenant.check_integrity()
            assert tenant.tenant == name
            assert bool(tenant) == (tenant.number in self._turns)
            dated = tenant.latest_start < math.inf
            assert dated == (tenant.number in self._slacks or tenant.number in self._barred)
        for heap in (self._turns, self._slacks, self._barred, self._absent):
            heap.check_integrity()
