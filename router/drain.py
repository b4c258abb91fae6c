"""How fast a queue empties while it is one: tokens that left it per second of backlog. Pure.

Its clock is the batcher's, which runs only while something is held back: what leaves an empty queue at once says
nothing of what replicas can do.
"""

from __future__ import annotations

import math

WINDOW_S = 1.0
"""Of backlog: older evidence fades."""
MIN_EVIDENCE_S = 0.1
STALL_S = 2.0
"""If nothing has left for so long, it is not the queue's speed that one sees: replicas have died, or are not yet there.
What fades then would soon say that the queue takes for ever, and everybody with a deadline was refused."""


class Drain:
    """Times are seconds of backlog and never decrease."""

    __slots__ = ("_at", "_idle_s", "_runs", "_time_s", "_tokens")

    def __init__(self) -> None:
        self._tokens = 0.0
        self._time_s = 0.0
        self._at = 0.0
        self._idle_s = 0.0
        self._runs = False

    def begin(self, at: float) -> None:
        """Something waits from now on. Idempotent."""
        if not self._runs:
            self._runs, self._at = True, at

    def end(self, at: float) -> None:
        """Nothing waits any more."""
        self._advance(at)
        self._runs = False

    def sent(self, num_tokens: int, at: float) -> None:
        """So much has left."""
        self._advance(at)
        self._tokens += num_tokens
        self._idle_s = 0.0

    def per_second(self, at: float) -> float | None:
        """Return tokens per second; None while there is too little evidence, or nothing leaves at all."""
        self._advance(at)
        if self._time_s < MIN_EVIDENCE_S or self._idle_s > STALL_S:
            return None
        return self._tokens / self._time_s

    def _advance(self, at: float) -> None:
        if not self._runs:
            return
        elapsed, self._at = at - self._at, at
        if elapsed > 0:
            keep = math.exp(-elapsed / WINDOW_S)
            self._tokens *= keep
            self._time_s = self._time_s * keep + elapsed
            self._idle_s += elapsed
