"""How long requests wait while no replica is there at all. Pure.

While one is expected to come they wait inside their deadlines; else for `max_wait_s`, from when a request was there and
nothing was expected. Who comes when the next replica is known to be ready too late need not wait at all.
"""

from __future__ import annotations

from typing import Final

from router.signal import ModelOutlook

LOOK_AGAIN_S: Final = 1.0
"""What is expected may change without a word."""


class ReplicaWait:
    """Begins without a replica, and with none expected. `now` and all times are on one clock, in seconds."""

    def __init__(self, max_wait_s: float, now: float) -> None:
        self.max_wait_s = max_wait_s
        self._since: float | None = now
        """None while a replica is ready or expected."""
        self._is_expected = False

    def see(self, now: float, *, has_replica: bool, outlook: ModelOutlook | None = None) -> None:
        """Take note of whether a replica is ready now, and of what is known of others."""
        self._is_expected = not has_replica and is_expected(outlook)
        if has_replica or self._is_expected:
            self._since = None
        elif self._since is None:
            self._since = now

    def overdue_since(self, now: float) -> float | None:
        """Return since when a request must have waited to be given up now; None if none is."""
        limit = now - self.max_wait_s
        return limit if self._since is not None and self._since <= limit else None

    def next_event(self, oldest_since: float | None, now: float) -> float | None:
        """Return when the request that has waited since `oldest_since` is given up if no replica comes, or when to look
        again."""
        if oldest_since is None:
            return None
        if self._since is None:
            return now + LOOK_AGAIN_S if self._is_expected else None
        return max(oldest_since, self._since) + self.max_wait_s


def is_expected(outlook: ModelOutlook | None) -> bool:
    """Say whether a replica will come: one is starting, or is started for whoever waits."""
    if outlook is None or outlook.failure:
        return False
    return bool(outlook.starting) or outlook.max_replicas > outlook.min_replicas


def ready_in_s(outlook: ModelOutlook | None) -> float | None:
    """Return when a replica will be ready at the earliest, where there is none; None if that is not known."""
    if outlook is None:
        return None
    return outlook.start_s if outlook.ready_in_s is None else outlook.ready_in_s
