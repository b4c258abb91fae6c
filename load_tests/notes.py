"""What the runs of a bench showed: a row of figures for each run, in the order of the runs. Pure.

    notes.add("session", age_ms=12.5, sent=100, ended=100)
    notes.median("session", "age_ms")

A figure that was never noted is None wherever it is asked for, so that what was not measured meets no bar. `sent` and
`ended` are what a generator counted: requests, and those of them that ended with exactly one terminal status.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from load_tests.bars import Bar, at_most


class Notes:
    def __init__(self, runs: Iterable[Mapping[str, Any]] = ()) -> None:
        self.runs = [dict(run) for run in runs]

    def add(self, what: str, **figures: Any) -> None:
        """Note one run of `what`. Figures are numbers, texts, None, or lists and tables of them."""
        self.runs.append({"what": what, **figures})

    def of(self, what: str, figure: str) -> list[Any]:
        """Return what all runs of `what` say of a figure, but for those that say nothing."""
        values = [run.get(figure) for run in self.runs if run["what"] == what]
        return [value for value in values if value is not None]

    def median(self, what: str, figure: str) -> float | None:
        values = self.of(what, figure)
        return statistics.median(values) if values else None

    def worst(self, what: str, figure: str) -> float | None:
        """Return the largest."""
        return max(self.of(what, figure), default=None)

    def total(self, what: str, figure: str) -> float | None:
        values = self.of(what, figure)
        return sum(values) if values else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return part / whole, or None where either is missing or the whole is nothing."""
    return None if part is None or not whole else part / whole


def difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


def figure(value: float | None, unit: str = "") -> str:
    """Return a figure for people."""
    return "not measured" if value is None else f"{value:.4g} {unit}".rstrip()


def judge_terminals(runs: Iterable[Mapping[str, Any]]) -> Bar:
    """Judge that each request of all runs ended with exactly one terminal status; a run whose router never came to have
    ended all that it had accepted (its `idle_s` is None) counts as one that did not."""
    counted = [run for run in runs if run.get("sent") is not None]
    without = [
        (run["what"], abs(run["sent"] - run["ended"]) + run.get("extra", 0) + (run.get("idle_s", 0.0) is None))
        for run in counted
    ]
    wrong = sum(number for _, number in without) if counted else None
    detail = f"{sum(run['sent'] for run in counted)} requests in {len(counted)} runs"
    for what, number in without:
        if number:
            detail += f"; {what}: {number}"
    return at_most("requests without exactly one terminal status", wrong, 0, detail)
