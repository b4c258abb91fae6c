"""Who goes next, together with whom: the requests that wait before a replica, as a pure structure.

Order: priority (lower first), then deadline, then acceptance. Expired requests are handed back, never dispatched. A
batch goes at once while there is credit and nothing was held back; after a lack of credit it goes when its budget is
full or its oldest request has waited `max_batch_wait_s`. Has no clock (`now` is an argument), no asyncio, no gRPC, and
does not know which replicas exist: placement decides where each group of a batch goes.
"""

from __future__ import annotations

from dataclasses import dataclass

from router.removable_heap import RemovableHeap
from router.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """A request that waits. `key` is the dispatcher's number for it; `since` is when this wait began."""

    key: int
    request: Request
    attempt: int = 1
    since: float

    @property
    def num_tokens(self) -> int:
        return self.request.num_known_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchBatch:
    """What leaves the queue together. A group goes to one replica; here each request is a group of its own."""

    batch_id: int
    groups: tuple[tuple[Queued, ...], ...]
    num_tokens: int


class Batcher:
    def __init__(self, *, max_batch_tokens: int, max_batch_requests: int, max_batch_wait_s: float) -> None:
        assert max_batch_tokens >= 1
        assert max_batch_requests >= 1
        self._max_tokens = max_batch_tokens
        self._max_requests = max_batch_requests
        self._max_wait_s = max_batch_wait_s
        self._queued: dict[int, Queued] = {}
        """In the order of `since`."""
        self._order = RemovableHeap()
        self._deadlines = RemovableHeap()
        self._num_tokens = 0
        self._num_batches = 0
        self._is_held = False
        """Whether something here was refused for lack of credit since the queue was last empty."""

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

    def add(self, queued: Queued) -> None:
        """Let `queued` wait. Its key must be new and its `since` not before that of any other."""
        assert queued.key not in self._queued
        request = queued.request
        self._queued[queued.key] = queued
        self._order.push(queued.key, (request.priority, request.deadline, request.accepted_at))
        self._deadlines.push(queued.key, request.deadline)
        self._num_tokens += queued.num_tokens

    def remove(self, key: int) -> Queued | None:
        """Take a request out of the queue and return it; None if it does not wait here."""
        queued = self._queued.pop(key, None)
        if queued is None:
            return None
        self._order.discard(key)
        self._deadlines.discard(key)
        self._num_tokens -= queued.num_tokens
        self._is_held = self._is_held and bool(self._queued)
        return queued

    def expire(self, now: float) -> list[Queued]:
        """Remove and return the requests whose deadline is not after `now`."""
        expired = []
        while (first := self._deadlines.first()) is not None and first[0] <= now:
            queued = self.remove(first[1])
            assert queued is not None
            expired.append(queued)
        return expired

    def waiting_since(self, limit: float) -> list[Queued]:
        """Remove and return the requests that have waited since `limit` or longer."""
        overdue = []
        for queued in self._queued.values():
            if queued.since > limit:
                break
            overdue.append(queued)
        for queued in overdue:
            self.remove(queued.key)
        return overdue

    def next_batch(self, now: float, credit_tokens: int) -> DispatchBatch | None:
        """Return the batch that goes now, or None. Call `expire(now)` first, and again until this returns None.

        `credit_tokens` is what all replicas together can take; the last request of a batch may exceed it.
        """
        if not self._queued:
            return None
        if credit_tokens <= 0:
            self._is_held = True
            return None
        if self._is_held and not self._is_full() and now < self._oldest_since() + self._max_wait_s:
            return None
        return self._take(now, min(credit_tokens, self._max_tokens))

    def next_event(self, credit_tokens: int) -> float | None:
        """Return when `expire` or `next_batch` will have something to do if nothing else happens, or None."""
        deadline = self._deadlines.first()
        if deadline is None:
            return None
        if credit_tokens > 0:
            return min(float(deadline[0]), self._oldest_since() + self._max_wait_s)
        return float(deadline[0])

    def _is_full(self) -> bool:
        return self._num_tokens >= self._max_tokens or len(self._queued) >= self._max_requests

    def _oldest_since(self) -> float:
        return next(iter(self._queued.values())).since

    def _take(self, now: float, max_tokens: int) -> DispatchBatch:
        taken: list[Queued] = []
        num_tokens = 0
        while len(taken) < self._max_requests and num_tokens < max_tokens and (first := self._order.first()):
            candidate = self._queued[first[1]]
            assert candidate.request.deadline > now, "expire() comes before next_batch()"
            if taken and num_tokens + candidate.num_tokens > self._max_tokens:
                break
            self.remove(candidate.key)
            taken.append(candidate)
            num_tokens += candidate.num_tokens
        self._num_batches += 1
        return DispatchBatch(
            batch_id=self._num_batches, groups=tuple((queued,) for queued in taken), num_tokens=num_tokens
        )

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        self._order.check_integrity()
        self._deadlines.check_integrity()
        assert len(self._queued) == len(self._order) == len(self._deadlines)
        assert all(key in self._order and key in self._deadlines for key in self._queued)
        assert self._num_tokens == sum(queued.num_tokens for queued in self._queued.values())
        assert self._queued or not self._is_held
