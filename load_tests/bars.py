"""Bars: what a measured figure must reach, as rows that every bench target writes in the same form. Pure.

    {"bar", "value", "limit", "ok", "detail"}

A value is None when it could not be measured, and then the bar is not met. Knows neither contestants nor workloads.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Bar:
    bar: str
    value: float | None
    limit: float
    ok: bool
    detail: str


def at_least(bar: str, value: float | None, limit: float, detail: str = "") -> Bar:
    return Bar(bar, _rounded(value), limit, value is not None and value >= limit, detail)


def at_most(bar: str, value: float | None, limit: float, detail: str = "") -> Bar:
    return Bar(bar, _rounded(value), limit, value is not None and value <= limit, detail)


@dataclass(frozen=True, slots=True)
class Best:
    """The best of several figures and whose it is."""

    name: str
    value: float


def largest(figures: Mapping[str, float | None]) -> Best | None:
    known = [Best(name, value) for name, value in figures.items() if value is not None]
    return max(known, key=lambda best: best.value, default=None)


def smallest(figures: Mapping[str, float | None]) -> Best | None:
    known = [Best(name, value) for name, value in figures.items() if value is not None]
    return min(known, key=lambda best: best.value, default=None)


def ratio(value: float | None, best: Best | None) -> float | None:
    """Return `value` as a multiple of the best one's, or None if either is missing."""
    return None if value is None or best is None else value / best.value


def exit_code(bars: Iterable[Bar]) -> int:
    return 0 if all(bar.ok for bar in bars) else 1


def write_bars(bars: Sequence[Bar], path: Path) -> None:
    """Write them as a list of objects, one a line."""
    lines = ",\n ".join(json.dumps(dataclasses.asdict(bar), ensure_ascii=False) for bar in bars)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n {lines}\n]\n")


def _rounded(value: float | None) -> float | None:
    """Four significant digits: a ratio's and a figure's alike."""
    return None if value is None else float(f"{value:.4g}")
