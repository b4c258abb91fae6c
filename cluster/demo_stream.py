"""One of the demo's long answers: what its reader got and when, and which replicas the router had it on. Pure.

Times are seconds on any clock that does not go back. Knows neither the client nor how anything looks.
"""

from __future__ import annotations

from collections.abc import Sequence

from octavo.client import Delta, Usage


class Stream:
    """Told in turn: `placed`, `took`, perhaps `lost`, then `placed` and `took` again, and `ended`."""

    def __init__(self, number: int, subject: str, request_id: str) -> None:
        self.number = number
        self.subject = subject
        self.request_id = request_id
        self.trace_id = ""
        self.text = ""
        self.token_ids: list[int] = []
        self.replicas: list[str] = []
        """In the order in which they had it."""
        self.usage: Usage | None = None
        """Set when it has ended."""
        self.tokens_at_loss: int | None = None
        """How many had come when its replica was killed; None if it was not on that one."""
        self.went_on_after_s: float | None = None
        """From its last token of the killed replica to its first of another one."""
        self.longest_pause_s = 0.0
        """Between two arrivals of its tokens."""
        self._placements_at_loss = 0
        self._first_at = self._last_at = 0.0
        self._num_first = 0

    @property
    def replica(self) -> str:
        """Where it is, or was last; empty before it is placed."""
        return self.replicas[-1] if self.replicas else ""

    @property
    def is_ended(self) -> bool:
        return self.usage is not None

    @property
    def is_waiting(self) -> bool:
        """Its replica is gone, and no other one has said anything yet."""
        return self.tokens_at_loss is not None and self.went_on_after_s is None and not self.is_ended

    @property
    def has_moved(self) -> bool:
        return len(self.replicas) > 1

    def placed(self, replica: str) -> None:
        """The router has sent it, or what is left of it, to `replica`."""
        self.replicas.append(replica)

    def took(self, delta: Delta, now: float) -> bool:
        """A piece came. Return whether it is the first since the stream lost its replica."""
        self.text += delta.text
        if not delta.token_ids:
            return False
        before, self._last_at = self._last_at, now
        self.token_ids += delta.token_ids
        if not self._num_first:
            self._first_at, self._num_first = now, len(delta.token_ids)
            return False
        self.longest_pause_s = max(self.longest_pause_s, now - before)
        if not self.is_waiting or len(self.replicas) == self._placements_at_loss:
            return False  # what comes between loss and placement was on its way already
        self.went_on_after_s = now - before
        return True

    def lost(self) -> None:
        """Its replica was killed."""
        self.tokens_at_loss = len(self.token_ids)
        self._placements_at_loss = len(self.replicas)

    def ended(self, usage: Usage) -> None:
        self.usage = usage
        if usage.replica and usage.replica != self.replica:  # the end came before news of the placement
            self.replicas.append(usage.replica)

    def tokens_per_s(self, now: float) -> float | None:
        """Of the tokens after the first ones, up to `now` or its end; None before there are any."""
        elapsed = (self._last_at if self.is_ended else now) - self._first_at
        later = len(self.token_ids) - self._num_first
        return later / elapsed if later > 0 and elapsed > 0 else None


def busiest(streams: Sequence[Stream]) -> str:
    """Return the replica that most of the streams that run are on; empty if none is."""
    running = [stream.replica for stream in streams if stream.replica and not stream.is_ended]
    return max(sorted(set(running)), key=running.count, default="")


def first_differences(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> list[int | None]:
    """Return for each pair of answers the first place where they have another token, or one of them none; None of
    identical ones."""
    return [_first_difference(one, other) for one, other in zip(ours, theirs, strict=True)]


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    for place, (left, right) in enumerate(zip(one, other, strict=False)):
        if left != right:
            return place
    return None if len(one) == len(other) else min(len(one), len(other))
