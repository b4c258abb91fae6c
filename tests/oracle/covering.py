"""Under which conditions the engine must say the same: all of them, or few that together show every pair of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

WHOLE = 4096
"""A budget that holds every prompt of the oracle whole."""

VALUES: dict[str, tuple[int, ...]] = {
    "is_warm": (False, True),
    "chunk_tokens": (16, 64, WHOLE),
    "batch": (1, 5, 16),
    "is_starved": (False, True),
    "n": (1, 3),
    "in_flight": (False, True),
    "resumes": (False, True),
    "lookup_tokens": (0, 4),
}


@dataclass(frozen=True)
class Case:
    is_warm: bool
    """The cache holds the blocks of every prompt."""
    chunk_tokens: int
    batch: int
    """Choices at once, of all requests together."""
    is_starved: bool
    """The pool has hardly more blocks than the largest request needs."""
    n: int
    in_flight: bool
    """All requests arrive in one step and each prompt comes twice; else each arrives after the last one's prefill."""
    resumes: bool
    """Part of each answer, cut at random, has been received before."""
    lookup_tokens: int

    def __str__(self) -> str:
        words = [
            "warm" if self.is_warm else "cold",
            f"chunk{self.chunk_tokens}" if self.chunk_tokens < WHOLE else "whole",
            f"batch{self.batch}",
            "starved" if self.is_starved else "ample",
            f"n{self.n}",
            "flight" if self.in_flight else "apart",
            *(["resumed"] if self.resumes else []),
            *(["lookup"] if self.lookup_tokens else []),
        ]
        return "-".join(words)


def product() -> list[Case]:
    return [Case(*values) for values in itertools.product(*VALUES.values())]  # type: ignore[arg-type]


def pairs(case: Case) -> set[tuple[tuple[str, int], ...]]:
    """Return every pair of conditions that `case` has."""
    return set(itertools.combinations(vars(case).items(), 2))


def covering() -> list[Case]:
    """Return cases in which every pair of conditions occurs: greedily, the case that adds most pairs next."""
    candidates = {case: pairs(case) for case in product()}
    missing = set().union(*candidates.values())
    chosen = []
    while missing:
        best = max(candidates, key=lambda case: len(candidates[case] & missing))
        missing -= candidates.pop(best)
        chosen.append(best)
    return chosen
