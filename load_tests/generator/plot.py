"""Plots as inline SVG: lines over a linear or logarithmic axis, and stacked bars. Colours are CSS classes of the page.

Every mark carries its value as a tooltip (``<title>``), and the whole plot a label for readers who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 240
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 30


@dataclass(frozen=True, slots=True)
class Line:
    """One curve; `points` ascend in x. `colour` is the number of a class of the page."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int


@dataclass(frozen=True, slots=True)
class Axis:
    """`shown` writes a value of it. What lies outside `low` to `high` is not drawn."""

    low: float
    high: float
    shown: Callable[[float], str]
    is_log: bool = False

    def place(self, value: float) -> float:
        """Return where `value` lies, 0 to 1."""
        if self.is_log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> Iterator[float]:
        """Yield four to ten round values."""
        if self.is_log:
            decades = math.log10(self.high / self.low)
            steps = (1, 2, 5) if decades < 3 else (1, 3) if decades < 4 else (1,)
            for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
                yield from (step * 10.0**power for step in steps if self.low <= step * 10.0**power <= self.high)
            return
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
        number = math.ceil(self.low / step)
        while number * step <= self.high * (1 + 1e-9):
            yield number * step
            number += 1


def seconds(value: float) -> str:
    """Return a duration as people write it."""
    if value == 0:
        return "0"
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def number(value: float) -> str:
    """Return a count or a rate as people write it."""
    if value >= 1e6:
        return f"{value / 1e6:.3g}M"
    return f"{value / 1e3:.4g}k" if value >= 1e4 else f"{value:.4g}"


def log_axis(values: Sequence[float]) -> Axis:
    """Return a logarithmic axis of durations that has room for `values`."""
    known = [value for value in values if value > 0]
    low, high = min(known, default=1e-3), max(known, default=1.0)
    return Axis(low * 0.8, max(high * 1.25, low * 10), seconds, is_log=True)


def linear_axis(values: Sequence[float], shown: Callable[[float], str] = number) -> Axis:
    """Return an axis from 0 that has room for `values`."""
    return Axis(0.0, max(values, default=0.0) * 1.05 or 1.0, shown)


def line_plot(label: str, lines: Sequence[Line], x: Axis, y: Axis) -> str:
    """Return a figure with its legend; where there is nothing to draw, it says so."""
    lines = [line for line in lines if line.points]
    if not lines:
        return f'<p class="none">{escape(label)}: nothing was measured.</p>'
    marks = "".join(_curve(line, x, y) for line in lines)
    return _figure(label, _frame(x, y) + marks, [(line.name, line.colour) for line in lines])


def bar_plot(label: str, bars: Sequence[tuple[str, Sequence[tuple[str, float]]]]) -> str:
    """Return horizontal bars, each (name, stacked parts (name, value)); part number n has colour n."""
    if not bars:
        return f'<p class="none">{escape(label)}: nothing was measured.</p>'
    most = max(sum(value for _, value in parts) for _, parts in bars) or 1.0
    left, height = 150, 20
    rows = []
    for row, (name, parts) in enumerate(bars):
        at, top = float(left), row * (height + 6) + 4
        rows.append(f'<text class="end" x="{left - 8}" y="{top + 14}">{escape(_short(name))}</text>')
        for colour, (part, value) in enumerate(parts):
            width = value / most * (WIDTH - left - 80)
            title = f"<title>{escape(name)}: {number(value)} {escape(part)}</title>"
            rows.append(
                f'<rect class="f{colour}" x="{at:.1f}" y="{top}" width="{width:.1f}" height="{height}">{title}</rect>'
            )
            at += width
        total = number(sum(value for _, value in parts))
        rows.append(f'<text x="{at + 6:.1f}" y="{top + 14}">{total}</text>')
    legend = [(part, colour) for colour, (part, _) in enumerate(bars[0][1])]
    return _figure(label, "".join(rows), legend, height=len(bars) * (height + 6) + 8)


def _figure(label: str, content: str, legend: Sequence[tuple[str, int]], *, height: int = HEIGHT) -> str:
    keys = "".join(f'<span><i class="b{colour}"></i>{escape(name)}</span>' for name, colour in legend)
    return (
        f'<figure><figcaption>{escape(label)}<span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{content}</svg></figure>'
    )


def _frame(x: Axis, y: Axis) -> str:
    parts = []
    for tick in y.ticks():
        at = _y(y, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 6}" y="{at + 4:.1f}">{escape(y.shown(tick))}</text>')
    for tick in x.ticks():
        at = _x(x, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="mid" x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}">{escape(x.shown(tick))}</text>')
    return "".join(parts)


def _curve(line: Line, x: Axis, y: Axis) -> str:
    points = [(_x(x, a), _y(y, b)) for a, b in line.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    dots = "".join(
        f'<circle class="dot" cx="{at:.1f}" cy="{up:.1f}" r="6">'
        f"<title>{escape(line.name)}: {escape(x.shown(a))}, {escape(y.shown(b))}</title></circle>"
        for (at, up), (a, b) in zip(points, line.points, strict=True)
    )
    return f'<polyline class="s{line.colour}" points="{path}"/>{dots}'


def _x(axis: Axis, value: float) -> float:
    return LEFT + min(1.0, max(0.0, axis.place(value))) * (WIDTH - LEFT - RIGHT)


def _y(axis: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - min(1.0, max(0.0, axis.place(value))) * (HEIGHT - TOP - BOTTOM)


def _short(name: str, limit: int = 20) -> str:
    return name if len(name) <= limit else f"…{name[1 - limit :]}"
