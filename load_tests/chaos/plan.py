"""Which fault strikes when: a list that follows from a seed. Pure.

Every kind comes once before any comes again, in an order that is drawn anew for each round.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")

FIRST = 0.25
"""When in its interval a fault strikes, as a share of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`due_s`: seconds after the load began. `length_s`: how long what passes by itself lasts. `draw`, in [0, 1),
    picks the victim among those that there are then."""

    kind: str
    due_s: float
    length_s: float
    draw: float

    def pick(self, candidates: Sequence[T]) -> T:
        """Return one of `candidates`, of which there is one at least."""
        return candidates[int(self.draw * len(candidates))]


def plan(
    kinds: Sequence[str], *, seed: int, duration_s: float, every_s: float, lengths_s: tuple[float, float]
) -> list[Fault]:
    """Return a fault for each whole interval of `every_s` in `duration_s`."""
    rng = random.Random(seed)
    faults: list[Fault] = []
    left: list[str] = []
    for number in range(int(duration_s / every_s)):
        if not left:
            left = rng.sample(list(kinds), len(kinds))
        fault = Fault(
            kind=left.pop(),
            due_s=(number + FIRST) * every_s,
            length_s=round(rng.uniform(*lengths_s), 1),
            draw=rng.random(),
        )
        faults.append(fault)
    return faults
