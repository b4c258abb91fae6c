"""Why requests wait in a queue: whether nobody was there, everybody was full, or it was not their turn.

Adds up how long each of the first two has lasted, so that a request's part of it is a difference of two readings: no
wait costs more for being long. Pure; `now` is in seconds.
"""

from __future__ import annotations

from typing import NamedTuple

from router.types import Wait


class Mark(NamedTuple):
    """The clock when a wait began."""

    since: float
    no_replica_s: float
    full_s: float
    num_gone: int
    num_waiting: int


class WaitClock:
    """Whoever looks at the queue says what it `see`s, at the latest before it goes away."""

    __slots__ = ("_full_s", "_is_full", "_is_without", "_no_replica_s", "_num_gone", "_seen_at")

    def __init__(self, now: float) -> None:
        self._seen_at = now
        self._is_without = self._is_full = False
        self._no_replica_s = self._full_s = 0.0
        self._num_gone = 0

    def see(self, now: float, *, has_replica: bool, has_room: bool) -> None:
        """From now on it is like this: whether a replica may be sent work at all, and whether one has credit."""
        past_s = max(now - self._seen_at, 0.0)
        if self._is_without:
            self._no_replica_s += past_s
        elif self._is_full:
            self._full_s += past_s
        self._seen_at = now
        self._is_without = not has_replica
        self._is_full = has_replica and not has_room

    def begin(self, now: float, num_waiting: int) -> Mark:
        """A request begins to wait, beside so many others."""
        without_s, full_s = self._read(now)
        return Mark(now, without_s, full_s, self._num_gone, num_waiting)

    def wait(self, mark: Mark, now: float) -> Wait:
        """Return what a wait that began at `mark` has been until now."""
        without_s, full_s = self._read(now)
        since, then_without_s, then_full_s, num_gone, num_waiting = mark
        without_s, full_s = without_s - then_without_s, full_s - then_full_s
        return Wait(since, now - since, without_s, full_s, num_waiting, self._num_gone - num_gone)

    def gone(self) -> None:
        """A request was sent."""
        self._num_gone += 1

    def _read(self, now: float) -> tuple[float, float]:
        past_s = max(now - self._seen_at, 0.0)
        return self._no_replica_s + past_s * self._is_without, self._full_s + past_s * self._is_full
