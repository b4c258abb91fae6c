"""Says when tokens leave the engine's thread: the first and the last of an answer at once, others together.

Each message wakes a replica's event loop, a router and a client, which on a small machine take their time from the
engine's own cores. Tokens that wait are at most `max_age_s` old when they leave, unless one step takes longer than the
step before it. Pure: knows neither clock nor thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from workers.types import TokenDelta


class Emission:
    """For one engine. `max_age_s` 0: every step's tokens leave at once."""

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._since: float | None = None
        """Since when tokens wait; None: none do."""

    def is_due(self, waiting: Iterable[TokenDelta], *, step_s: float, now: float, is_last: bool) -> bool:
        """Say whether `waiting` is to leave, of which a step of `step_s` has added some at `now`.

        As long as that step took, so long the next one will take. `is_last`: no step follows at once.
        """
        is_urgent = is_last
        for delta in waiting:
            if self._since is None:
                self._since = now
            is_urgent = is_urgent or delta.finish is not None or delta.num_cached_tokens is not None
        if self._since is None:
            return False
        if is_urgent or now - self._since + step_s > self._max_age_s:
            self._since = None
            return True
        return False

    def release(self) -> bool:
        """Say whether something waits; it is to leave, since nobody knows how long the next step takes."""
        waits, self._since = self._since is not None, None
        return waits
