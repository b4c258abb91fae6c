"""What has come for one model, what was turned away, and how long the rest is with replicas: counts for the signal.

In sequences: a request counts once for each of its choices. Pure; a request costs a few additions. `now` is in seconds.
"""

from __future__ import annotations


class Traffic:
    """Counters only grow."""

    __slots__ = ("_sent_at", "num_arrived", "num_ended", "num_running", "num_turned_away", "served_s")

    def __init__(self) -> None:
        self.num_arrived = 0
        """Those turned away among them."""
        self.num_turned_away = 0
        """Which another replica might have answered."""
        self.num_ended = 0
        """Attempts at replicas."""
        self.served_s = 0.0
        """What these have taken."""
        self.num_running = 0
        self._sent_at = 0.0
        """The sum of when those that run were sent."""

    def boarded(self, num_sequences: int, now: float) -> None:
        """A replica has them; `left` or `recalled` follows once."""
        self.num_running += num_sequences
        self._sent_at += num_sequences * now

    def recalled(self, num_sequences: int, sent_at: float) -> None:
        """They were not sent after all."""
        self.num_running -= num_sequences
        self._sent_at -= num_sequences * sent_at
        if not self.num_running:
            self._sent_at = 0.0  # what rounding has left

    def left(self, num_sequences: int, sent_at: float, now: float) -> None:
        """Their attempt, which began at `sent_at`, has ended."""
        self.recalled(num_sequences, sent_at)
        self.num_ended += num_sequences
        self.served_s += num_sequences * (now - sent_at)

    def running_s(self, now: float) -> float:
        """Return what those that run have taken so far, together."""
        return max(self.num_running * now - self._sent_at, 0.0)
