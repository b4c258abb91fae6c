"""What may wait: a backlog bounded in tokens and requests, which count once for each of their choices. More is refused
at once, with the numbers.

A `Permit` spans the whole life of a request: it counts as queued until it is dispatched, then as running, and is
released exactly once. Pure: `now` is an argument. Knows no replicas and no order.
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
        self._throughput = Throughput()

    def admit(self, num_tokens: int, now: float, *, num_choices: int = 1) -> Permit:
        """Return a permit for a prompt of `num_tokens`, which all choices share and the caller must release.

        Raises OverloadedError when it would exceed the backlog. A request that finds the queue empty is taken on
        whatever its size, else it could never be.
        """
        tokens, choices = self._queued_tokens + num_tokens, self._queued_choices + num_choices
        if self._queued_requests and (tokens > self._max_tokens or choices > self._max_requests):
            raise OverloadedError(
                f"{self._queued_choices} requests with {self._queued_tokens} tokens are queued and this one has "
                f"{num_tokens}; at most {self._max_requests} requests and {self._max_tokens} tokens may be, "
                f"each choice of a request counts as one",
                retry_after_s=self._retry_after_s(num_tokens, now),
            )
        permit = Permit(self, num_tokens, num_choices)
        permit._queue(1)
        return permit

    def backlog(self) -> Backlog:
        return Backlog(
            num_queued_requests=self._queued_requests,
            num_queued_tokens=self._queued_tokens,
            num_running_requests=self._running_requests,
            max_queued_tokens=self._max_tokens,
        )

    def _retry_after_s(self, num_tokens: int, now: float) -> float:
        """Estimate when as many tokens as this request needs will have left the queue."""
        rate = self._throughput.per_second(now)
        excess = max(self._queued_tokens + num_tokens - self._max_tokens, num_tokens)
        return min(max(excess / rate, MIN_RETRY_S), MAX_RETRY_S) if rate > 0 else RETRY_UNKNOWN_S


class Permit:
    """A request's share of the backlog. queued -> running -> released; back to queued when its replica was lost."""

    __slots__ = ("_admission", "_num_choices", "_num_tokens", "_state")

    def __init__(self, admission: Admission, num_tokens: int, num_choices: int) -> None:
        self._admission = admission
        self._num_tokens = num_tokens
        self._num_choices = num_choices
        self._state = "queued"

    def dispatched(self, now: float) -> None:
        assert self._state == "queued"
        self._admission._throughput.add(self._num_tokens, now)
        self._leave()
        self._admission._running_requests += 1
        self._state = "running"

    def requeued(self) -> None:
        """Count as queued again; what was accepted is not refused later, so the bound may be exceeded by these."""
        assert self._state == "running"
        self._leave()
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
