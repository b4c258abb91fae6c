"""What a cluster was like while its load changed: samples of a router's status, and what follows from them. Pure.

Times are seconds on any clock that does not go back. `target` is how many replicas there shall be, None where nobody
said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

READY = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    at: float
    target: int | None
    states: dict[str, str]
    """Of each replica that the router knows, by its id."""
    num_queued: int
    num_running: int
    num_nodes: int = 1

    @property
    def ready(self) -> frozenset[str]:
        return frozenset(replica for replica, state in self.states.items() if state == READY)


class Timeline:
    def __init__(self, samples: Iterable[Sample] = ()) -> None:
        self.samples = list(samples)

    def between(self, since: float, until: float = float("inf")) -> Timeline:
        return Timeline(sample for sample in self.samples if since <= sample.at <= until)

    def first(self, holds: Callable[[Sample], object], since: float = 0.0) -> float | None:
        """Return when something first held, from `since` on; None: never."""
        return next((sample.at for sample in self.samples if sample.at >= since and holds(sample)), None)

    def last(self, holds: Callable[[Sample], object]) -> float | None:
        """Return when something last held; None: never."""
        return next((sample.at for sample in reversed(self.samples) if holds(sample)), None)

    def targets(self) -> list[int]:
        """Return the targets in their order, each as often as it was set."""
        return changes(sample.target for sample in self.samples)

    def served_since(self) -> dict[str, float]:
        """Return when each replica was first seen ready."""
        found: dict[str, float] = {}
        for sample in self.samples:
            for replica in sample.ready:
                found.setdefault(replica, sample.at)
        return found

    def figures(self, zero: float) -> dict[str, Any]:
        """Return for the notes when target, ready replicas, and nodes changed, in seconds from `zero`."""
        return {
            name: _steps((sample.at - zero, read(sample)) for sample in self.samples)
            for name, read in (
                ("targets", lambda sample: sample.target),
                ("ready", lambda sample: len(sample.ready)),
                ("nodes", lambda sample: sample.num_nodes),
            )
        }


def changes(values: Iterable[int | None]) -> list[int]:
    """Return values without what is unknown or repeats the one before."""
    found: list[int] = []
    for value in values:
        if value is not None and (not found or value != found[-1]):
            found.append(value)
    return found


def turns(values: list[int]) -> int:
    """Return how often `values` go the other way: 1 of up and down, 2 of up, down and up again."""
    ways = [later > earlier for earlier, later in pairwise(values) if later != earlier]
    return sum(way != before for before, way in pairwise(ways))


def _steps(points: Iterable[tuple[float, int | None]]) -> list[list[float]]:
    found: list[list[float]] = []
    for at, value in points:
        if value is not None and (not found or value != found[-1][1]):
            found.append([round(at, 2), value])
    return found
