"""What may wait: a backlog bounded in tokens and requests, which count once for each of their choices. More is refused
at once, with the numbers.

Tenants share it: when it is full, one that has less of it than an equal part gets room at the cost of the one that has
most, and only who has its part already is refused. A `Permit` spans the whole life of a request: it counts as queued
until it is dispatched, then as running, and is released exactly once. Pure: `now` is an argument. Knows no replicas and
no order. Remembers no tenant of whom nothing waits.
"""

from __future__ import annotations

import math

from router.types import Backlog
from workers.errors import OverloadedError

THROUGHPUT_WINDOW_S = 10.0
RETRY_UNKNOWN_S = 1.0
MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0


class Admission:
    def __init__(self, *, max_queued_tokens: int, max_queued_requests: int) -> None:
        self._max_tokens = max_queued_tokens
        self._max_requests = max_queued_requests
        self._queued_tokens = 0
        self._queued_requests = 0
        self._queued_choices = 0
        self._running_requests = 0
        self._tenants: dict[str, _Part] = {}
        """Those of which something is queued."""
        self._throughput = Throughput()

    def admit(self, num_tokens: int, now: float, *, tenant: str = "", num_choices: int = 1) -> Permit:
        """Return a permit for a prompt of `num_tokens`, which all choices share and the caller must release.

        Raises OverloadedError when it would exceed the backlog. A request that finds the queue empty is taken on
        whatever its size, else it could never be.
        """
        if self._exceeds(num_tokens, num_choices):
            raise self.refusal(num_tokens, now)
        permit = Permit(self, tenant, num_tokens, num_choices)
        permit._queue(1)
        return permit

    def who_gives_way(self, num_tokens: int, now: float, *, tenant: str = "", num_choices: int = 1) -> str | None:
        """Return the tenant of whom a waiting request must go before `admit` has room for this one; None if it has.

        Raises OverloadedError when `tenant` would then have more than an equal part of the backlog.
        """
        if not self._exceeds(num_tokens, num_choices):
            return None
        own = self._tenants.get(tenant) or _Part()
        num_parts = len(self._tenants) + (tenant not in self._tenants)
        tokens, choices = own.tokens + num_tokens, own.choices + num_choices
        if tokens * num_parts > self._max_tokens or choices * num_parts > self._max_requests:
            raise self.refusal(num_tokens, now)
        return max(self._tenants, key=lambda name: self._tenants[name].share(self._max_tokens, self._max_requests))

    def refusal(self, num_tokens: int, now: float) -> OverloadedError:
        """Return what a request of `num_tokens` is refused with."""
        return OverloadedError(
            f"{self._queued_choices} requests with {self._queued_tokens} tokens are queued and this one has "
            f"{num_tokens}; at most {self._max_requests} requests and {self._max_tokens} tokens may be, "
            f"each choice of a request counts as one",
            retry_after_s=self._retry_after_s(num_tokens, now),
        )

    def _exceeds(self, num_tokens: int, num_choices: int) -> bool:
        tokens, choices = self._queued_tokens + num_tokens, self._queued_choices + num_choices
        return self._queued_requests > 0 and (tokens > self._max_tokens or choices > self._max_requests)

    def backlog(self) -> Backlog:
        return Backlog(
            num_queued_requests=self._queued_requests,
            num_queued_tokens=self._queued_tokens,
            num_running_requests=self._running_requests,
            max_queued_tokens=self._max_tokens,
            num_queued_sequences=self._queued_choices,
        )

    def check_integrity(self) -> None:
        """Assert that tenants' parts are the whole; for tests."""
        parts = self._tenants.values()
        assert sum(part.requests for part in parts) == self._queued_requests
        assert sum(part.choices for part in parts) == self._queued_choices
        assert sum(part.tokens for part in parts) == self._queued_tokens
        assert all(part.requests > 0 for part in parts)

    def _retry_after_s(self, num_tokens: int, now: float) -> float:
        """Estimate when as many tokens as this request needs will have left the queue."""
        rate = self._throughput.per_second(now)
        excess = max(self._queued_tokens + num_tokens - self._max_tokens, num_tokens)
        return min(max(excess / rate, MIN_RETRY_S), MAX_RETRY_S) if rate > 0 else RETRY_UNKNOWN_S


class Permit:
    """A request's share of the backlog. queued -> running -> released; back to queued when its replica was lost."""

    __slots__ = ("_admission", "_num_choices", "_num_tokens", "_state", "_tenant")

    def __init__(self, admission: Admission, tenant: str, num_tokens: int, num_choices: int) -> None:
        self._admission = admission
        self._tenant = tenant
        self._num_tokens = num_tokens
        self._num_choices = num_choices
        self._state = "queued"

    def dispatched(self, now: float) -> None:
        assert self._state == "queued"
        self._admission._throughput.add(self._num_tokens, now)
        self._leave()
        self._admission._running_requests += 1
        self._state = "running"

    def requeued(self, num_tokens: int) -> None:
        """Count as queued again, now with `num_tokens`; what was accepted is not refused later, so the bound may be
        exceeded by these."""
        assert self._state == "running"
        self._leave()
        self._num_tokens = num_tokens
        self._queue(1)
        self._state = "queued"

    def release(self) -> None:
        assert self._state != "released"
        self._leave()
        self._state = "released"

    def _leave(self) -> None:
        if self._state == "queued":
            self._queue(-1)
        else:
            self._admission._running_requests -= 1

    def _queue(self, sign: int) -> None:
        """Enter (1) or leave (-1) what is counted as queued."""
        self._admission._queued_requests += sign
        self._admission._queued_choices += sign * self._num_choices
        self._admission._queued_tokens += sign * self._num_tokens
        part = self._admission._tenants.setdefault(self._tenant, _Part())
        part.requests += sign
        part.choices += sign * self._num_choices
        part.tokens += sign * self._num_tokens
        if not part.requests:
            del self._admission._tenants[self._tenant]


class _Part:
    """What one tenant has of the backlog."""

    __slots__ = ("choices", "requests", "tokens")

    def __init__(self) -> None:
        self.requests = self.choices = self.tokens = 0

    def share(self, max_tokens: int, max_requests: int) -> float:
        return max(self.tokens / max_tokens, self.choices / max_requests)


class Throughput:
    """Tokens per second over about the last `THROUGHPUT_WINDOW_S`, by exponential decay."""

    __slots__ = ("_at", "_start", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._at = 0.0
        self._start: float | None = None

    def add(self, num_tokens: int, now: float) -> None:
        if self._start is None:
            self._start = self._at = now
        self._tokens = self._decayed(now) + num_tokens
        self._at = now

    def per_second(self, now: float) -> float:
        """Return 0 before the first tokens."""
        if self._start is None:
            return 0.0
        # The weight of the window that has passed so far; at least a tenth of a second against a division by nothing.
        age = max(now - self._start, 0.1)
        return self._decayed(now) / (THROUGHPUT_WINDOW_S * -math.expm1(-age / THROUGHPUT_WINDOW_S))

    def _decayed(self, now: float) -> float:
        return self._tokens * math.exp(-max(now - self._at, 0.0) / THROUGHPUT_WINDOW_S)
