"""Who goes next, together with whom: the requests that wait before the replicas, as a pure structure.

An `Order` says who goes first (`router/order.py`). With it go those that share its beginning
(`router/prefix_groups.py`), within the same priority, tenant and batch, so that one replica computes it once. Before it
may go one of the same priority and tenant whose beginning a replica that could take it has already: where caches cannot
hold all beginnings, those that are there are used before others take their place. Nobody is passed so by more than
`MAX_PASSES`, nor while a deadline presses. Whose deadline has passed, or cannot be met any more by the speed measured,
is handed back and never dispatched. A batch goes at once while there is credit and nothing was held back; after a lack
of credit it goes when its budget is full or its oldest request has waited `max_batch_wait_s`. Has no clock (`now` is an
argument), no asyncio, no gRPC; does not know which replicas exist: placement decides where each group of a batch goes.
Hashes no prompt while a single request waits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice

from router.order import Order
from router.prefix_groups import PrefixGroups
from router.queued import Queued
from router.removable_heap import RemovableHeap
from router.speeds import Speeds

MIN_PAUSE_S = 0.001
"""Before the next look at one whom only the time keeps."""
MAX_PASSES = 16
"""So many go at most before one whose turn it was, or would have been before theirs, for what caches have."""
MAX_SEEN = 32
"""So many of a tenant's requests are looked at, the oldest, for one whose beginning is at hand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchBatch:
    """What leaves the queue together. A group shares its beginning and goes to one replica if that is cheaper."""

    batch_id: int
    groups: tuple[tuple[Queued, ...], ...]
    num_tokens: int
    """Prompt tokens; of those that a group shares, each once."""


class Batcher:
    """`speeds`: how long answers take; None: deadlines are kept to the moment, and nothing is foreseen."""

    def __init__(
        self,
        order: Order,
        *,
        max_batch_tokens: int,
        max_batch_requests: int,
        max_batch_wait_s: float,
        speeds: Speeds | None = None,
    ) -> None:
        assert max_batch_tokens >= 1
        assert max_batch_requests >= 1
        self._order = order
        self._max_tokens = max_batch_tokens
        self._max_requests = max_batch_requests
        self._max_wait_s = max_batch_wait_s
        self._speeds = speeds
        self._queued: dict[int, Queued] = {}
        """In the order of `since`."""
        self._tenants: dict[str, dict[int, Queued]] = {}
        """The same by tenant."""
        self._ends = RemovableHeap()
        """When each of them will have waited too long."""
        self._hopeless: list[Queued] = []
        """Found so when it was their turn, and not yet handed back."""
        self._groups = PrefixGroups()
        self._passes: dict[int, int] = {}
        """How many went before each of them for what caches have; those that none did are not in it."""
        self._num_tokens = 0
        self._num_batches = 0
        self._held_since: float | None = None
        """Since when something here has been refused for lack of credit, without the queue having been empty."""
        self._held_s = 0.0
        """How long that was the case before."""

    @property
    def num_requests(self) -> int:
        return len(self._queued)

    @property
    def num_tokens(self) -> int:
        """Prompt tokens that wait."""
        return self._num_tokens

    @property
    def oldest_since(self) -> float | None:
        """When the longest wait here began; None when nothing waits."""
        return self._oldest_since() if self._queued else None

    @property
    def is_held(self) -> bool:
        """Whether there is a backlog: something waits that there was no credit for."""
        return self._held_since is not None

    def backlog_s(self, now: float) -> float:
        """Return for how long in all there was a backlog: the clock of `Order`."""
        return self._held_s + (0.0 if self._held_since is None else max(now - self._held_since, 0.0))

    def add(self, queued: Queued) -> None:
        """Let `queued` wait. Its key must be new and its `since` not before that of any other."""
        assert queued.key not in self._queued
        self._queued[queued.key] = queued
        self._tenants.setdefault(queued.request.tenant, {})[queued.key] = queued
        self._order.add(queued, self.backlog_s(queued.since))
        self._ends.push(queued.key, self._end(queued, queued.since))
        self._groups.add(queued)
        self._num_tokens += queued.num_tokens

    def remove(self, key: int, now: float) -> Queued | None:
        """Take a request out of the queue and return it; None if it does not wait here."""
        queued = self._queued.get(key)
        if queued is not None:
            self._order.remove(queued, self.backlog_s(now))
            self._forget(queued, now)
        return queued

    def newest(self, tenant: str) -> Queued | None:
        """Return the tenant's request that has waited for the shortest time, if it was never sent; None if there is
        none."""
        waiting = reversed(self._tenants.get(tenant, {}).values())
        return next((queued for queued in waiting if queued.attempt == 1), None)

    def expire(self, now: float) -> list[Queued]:
        """Remove and return the requests whose deadline is not after `now`, or cannot be met any more."""
        expired, self._hopeless = self._hopeless, []
        while (first := self._ends.first()) is not None and first[0] <= now:
            queued = self._queued[first[1]]
            end = self._end(queued, now)
            if end <= now:
                self.remove(queued.key, now)
                expired.append(queued)
            else:  # replicas have become faster meanwhile
                self._ends.discard(queued.key)
                self._ends.push(queued.key, end)
        return expired

    def waiting_since(self, limit: float, now: float) -> list[Queued]:
        """Remove and return the requests that have waited since `limit` or longer."""
        overdue = []
        for queued in self._queued.values():
            if queued.since > limit:
                break
            overdue.append(queued)
        for queued in overdue:
            self.remove(queued.key, now)
        return overdue

    def next_batch(
        self,
        now: float,
        credit_tokens: int,
        *,
        credit_sequences: int = sys.maxsize,
        block_size: int = 0,
        at_hand: Callable[[bytes], bool] | None = None,
    ) -> DispatchBatch | None:
        """Return the batch that goes now, or None. Call `expire(now)` before, and again after the last one.

        The credit is what all replicas together can take; the last request of a batch may exceed it. `block_size` is
        that of the replicas; 0: nobody knows, and nothing is grouped. `at_hand` says whether a replica with credit has
        the block with this hash, or computes it; None: nobody knows.
        """
        if not self._queued:
            return None
        if credit_tokens <= 0 or credit_sequences <= 0:
            if self._held_since is None:
                self._held_since = now
            return None
        if self.is_held and not self._is_full() and now < self._oldest_since() + self._max_wait_s:
            return None
        budget = _Budget(min(credit_tokens, self._max_tokens), self._max_tokens, credit_sequences, self._max_requests)
        groups = []
        while budget.has_room and (first := self._next(now, budget)) is not None:
            passed: list[int] = []
            if at_hand is not None and block_size and len(self._queued) > 1:
                first, passed = self._cached_first(first, now, block_size, at_hand)
            if not budget.fits(first.num_tokens):
                break
            for key in passed:
                self._passes[key] = self._passes.get(key, 0) + 1
            groups.append(self._take_group(first, now, budget, block_size))
        if not groups:
            return None
        self._num_batches += 1
        return DispatchBatch(batch_id=self._num_batches, groups=tuple(groups), num_tokens=budget.num_tokens)

    def next_event(self, credit_tokens: int, now: float) -> float | None:
        """Return when `expire` or `next_batch` will have something to do if nothing else happens, or None."""
        first = self._ends.first()
        if first is None:
            return None
        end = float(first[0])
        if credit_tokens <= 0:
            return end
        if self._order.due is not None:
            return min(end, max(self._order.due, now + MIN_PAUSE_S))
        return min(end, self._oldest_since() + self._max_wait_s)

    def _is_full(self) -> bool:
        return self._num_tokens >= self._max_tokens or len(self._queued) >= self._max_requests

    def _oldest_since(self) -> float:
        return next(iter(self._queued.values())).since

    def _next(self, now: float, budget: _Budget) -> Queued | None:
        """Return who goes next; put those aside that could not be in time."""
        while True:
            at, num_free = self.backlog_s(now), budget.num_places
            queued = self._order.next(now, at, num_free=num_free, is_held=self.is_held)
            if queued is None or self._end(queued, now) > now:
                return queued
            self.remove(queued.key, now)
            self._hopeless.append(queued)

    def _cached_first(
        self, first: Queued, now: float, block_size: int, at_hand: Callable[[bytes], bool]
    ) -> tuple[Queued, list[int]]:
        """Return who goes: `first`, whose turn it is, or instead of it one of which more is cached; and the keys of
        those that are passed by that."""
        own = self._groups.half(first, block_size)
        if own is None or at_hand(own):
            return first, []
        known, passed = {own: False}, [first.key]
        priority = first.request.priority
        for queued in islice(self._tenants[first.request.tenant].values(), MAX_SEEN):
            if queued.request.priority != priority or queued is first:
                continue
            half = self._groups.half(queued, block_size)
            if half is not None:
                if half not in known:
                    known[half] = at_hand(half)
                if known[half]:
                    break
            passed.append(queued.key)
        else:
            return first, []
        if any(self._passes.get(key, 0) >= MAX_PASSES for key in passed) or not self._may_pass(queued, now):
            return first, []
        return queued, passed

    def _may_pass(self, queued: Queued, now: float) -> bool:
        return self._end(queued, now) > now and self._order.may_pass(queued, now, self.backlog_s(now))

    def _take_group(self, first: Queued, now: float, budget: _Budget, block_size: int) -> tuple[Queued, ...]:
        self._take(first, now)
        budget.spend(first, first.num_tokens)
        group = [first]
        if block_size and self._queued and budget.has_places:
            for rider, num_shared in self._groups.companions(first, block_size):
                num_tokens = rider.num_tokens - num_shared
                if not (budget.has_places and budget.fits(num_tokens)):
                    break
                if self._may_ride(first, rider, now):
                    self._take(rider, now)
                    budget.spend(rider, num_tokens)
                    group.append(rider)
        return tuple(group)

    def _may_ride(self, first: Queued, rider: Queued, now: float) -> bool:
        return (
            (rider.request.priority, rider.request.tenant) == (first.request.priority, first.request.tenant)
            and self._end(rider, now) > now
            and self._order.may_ride(rider, now, self.backlog_s(now))
        )

    def _take(self, queued: Queued, now: float) -> None:
        self._order.take(queued, self.backlog_s(now), is_held=self.is_held)
        self._forget(queued, now)

    def _forget(self, queued: Queued, now: float) -> None:
        """`queued` has left the order."""
        del self._queued[queued.key]
        tenant = self._tenants[queued.request.tenant]
        del tenant[queued.key]
        if not tenant:
            del self._tenants[queued.request.tenant]
        self._ends.discard(queued.key)
        self._groups.remove(queued)
        self._passes.pop(queued.key, None)
        self._num_tokens -= queued.num_tokens
        if not self._queued:
            self._held_s, self._held_since = self.backlog_s(now), None

    def _end(self, queued: Queued, now: float) -> float:
        """Return when `queued` has waited too long: when its client's deadline cannot be met any more, as far as
        anybody knows."""
        request = queued.request
        if self._speeds is None or not request.has_own_deadline:
            return request.deadline
        service_s = self._speeds.service_s(request, now)
        if service_s is None:
            return request.deadline
        return request.deadline - service_s - (self._speeds.last_margin_s if self.is_held else 0.0)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        self._order.check_integrity()
        self._ends.check_integrity()
        self._groups.check_integrity(self._queued)
        assert len(self._queued) == len(self._ends) == sum(map(len, self._tenants.values()))
        assert all(self._tenants.values())
        assert all(key in self._ends for key in self._queued)
        assert self._num_tokens == sum(queued.num_tokens for queued in self._queued.values())
        assert self._passes.keys() <= self._queued.keys()
        assert all(1 <= passes <= MAX_PASSES for passes in self._passes.values())
        assert self._queued or not self.is_held


class _Budget:
    """What a batch may still hold."""

    __slots__ = ("_credit_tokens", "_max_tokens", "_num_requests", "num_places", "num_tokens")

    def __init__(self, credit_tokens: int, max_tokens: int, num_places: int, num_requests: int) -> None:
        self._credit_tokens = credit_tokens
        self._max_tokens = max_tokens
        self.num_places = num_places
        self._num_requests = num_requests
        self.num_tokens = 0

    @property
    def has_places(self) -> bool:
        """For one more request that shares what is computed anyway."""
        return self.num_places > 0 and self._num_requests > 0

    @property
    def has_room(self) -> bool:
        return self.has_places and self.num_tokens < self._credit_tokens

    def fits(self, num_tokens: int) -> bool:
        """The first one always does."""
        return not self.num_tokens or self.num_tokens + num_tokens <= self._max_tokens

    def spend(self, queued: Queued, num_tokens: int) -> None:
        self.num_tokens += num_tokens
        self.num_places -= queued.request.n
        self._num_requests -= 1
