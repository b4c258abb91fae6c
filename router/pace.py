"""How long a stream waits after a message until its next one, when a router has many streams to write to.

A message costs the router some 0.1 ms, whatever is in it: with few of them tokens go out one by one, at once; with many
each stream's next tokens wait for company, which spares their messages, and spreads what one step brought for all
streams over the time until the next. The first message of a stream never waits. Pure: one for all streams of a router.
"""

from __future__ import annotations

from typing import Final

FREE_PER_S: Final = 3_000
"""Messages a second up to which none has to wait: about a third of what a router can write."""
BURST: Final = 32
"""Messages that may be written at once before that counts."""
MAX_WAIT_S: Final = 0.014


class Pace:
    def __init__(self, *, free_per_s: float = FREE_PER_S, burst: int = BURST, max_wait_s: float = MAX_WAIT_S) -> None:
        self._interval_s = 1 / free_per_s
        self._lead_s = burst / free_per_s
        self._max_wait_s = max_wait_s
        self._due = float("-inf")
        """When the last message would have been written, had all been written evenly."""

    def wait_s(self, now: float) -> float:
        """Count a message that was written `now`; return how long its stream is to wait before the next; often 0."""
        due = max(self._due, now - self._lead_s) + self._interval_s
        self._due = min(due, now + self._max_wait_s)
        return max(0.0, self._due - now)
