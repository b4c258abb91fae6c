"""How long requests wait while no replica is there at all: `max_wait_s`, from when both were true. Pure."""

from __future__ import annotations


class ReplicaWait:
    """Begins without a replica. `now` and all times are on one clock, in seconds."""

    def __init__(self, max_wait_s: float, now: float) -> None:
        self.max_wait_s = max_wait_s
        self._since: float | None = now
        """None while a replica is ready."""

    def see(self, now: float, *, has_replica: bool) -> None:
        """Take note of whether a replica is ready now."""
        if has_replica:
            self._since = None
        elif self._since is None:
            self._since = now

    def overdue_since(self, now: float) -> float | None:
        """Return since when a request must have waited to be given up now; None if none is."""
        limit = now - self.max_wait_s
        return limit if self._since is not None and self._since <= limit else None

    def next_event(self, oldest_since: float | None) -> float | None:
        """Return when the request that has waited since `oldest_since` is given up, if no replica comes."""
        if self._since is None or oldest_since is None:
            return None
        return max(oldest_since, self._since) + self.max_wait_s
