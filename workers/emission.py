"""Says when tokens leave the engine's thread: the first and the last of an answer at once, others together.

Each message wakes a replica's event loop, a router and a client, which on a small machine take their time from the
engine's own cores. That is much for one token and little for many, so up to `FEW` tokens wait for `max_age_s` at most,
and k times as many for a k-th part of it. One step that takes longer than the step before it is not foreseen. Pure:
knows neither clock nor thread.
"""

from __future__ import annotations

from typing import Final

FEW: Final = 128
"""So many tokens may wait for the whole of `max_age_s`. A message costs all who handle it about 0.5 ms, a token in it
10 to 20 µs: with 16 of them the message is two thirds of the whole, with 128 a fifth, and waiting on saves little. Of
64 streams at 30,000 tokens/s each token took all processes 44 µs with 16 and 25 µs with 128, and one in a hundred of
them was older than 15 and 12 ms."""


class Emission:
    """For one engine. `max_age_s` 0: every step's tokens leave at once."""

    def __init__(self, max_age_s: float) -> None:
        self._max_age_s = max_age_s
        self._num_waiting = 0
        self._is_urgent = False
        self._since: float | None = None
        """Since when tokens wait; None: none do."""

    def add(self, num_deltas: int, *, is_urgent: bool) -> None:
        """So many are there that were not; `is_urgent`: the first or the last of an answer is among them."""
        self._num_waiting += num_deltas
        self._is_urgent = self._is_urgent or is_urgent

    def is_due(self, *, step_s: float, now: float, is_last: bool) -> bool:
        """Say whether what waits is to leave, after a step of `step_s` that ended `now`.

        As long as that step took, so long the next one will take. `is_last`: no step follows at once.
        """
        if not self._num_waiting:
            return False
        if self._since is None:
            self._since = now
        max_age_s = self._max_age_s * FEW / max(FEW, self._num_waiting)
        if is_last or self._is_urgent or now - self._since + step_s > max_age_s:
            self.release()
            return True
        return False

    def release(self) -> bool:
        """Say whether something waits; it is to leave, since nobody knows how long the next step takes."""
        waits, self._since, self._num_waiting, self._is_urgent = self._num_waiting > 0, None, 0, False
        return waits
