"""Panels over time as a picture: one SVG, a small chart for each panel, with its lines and their names. Pure.

What Grafana would show, for whoever has none at hand. Every panel has a scale of its own, from zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLUMNS, WIDTH, HEIGHT = 3, 330, 170
LEFT, TOP, BOTTOM, RIGHT = 46, 26, 34, 8
HEAD = 34
COLOURS = ("#3b6ea5", "#c8553d", "#588157", "#8d6a9f", "#d9a441", "#4aa3a2", "#7a7a7a")
MAX_LINES = len(COLOURS)
LETTER = 6
"""The width of one in the legend."""


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[tuple[float, float]]
    """Seconds and values."""


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    unit: str
    """As Grafana calls it."""
    lines: Sequence[Line]


def draw(title: str, charts: Sequence[Chart]) -> str:
    """Return the document."""
    rows = -(-len(charts) // COLUMNS)
    width, height = COLUMNS * WIDTH, HEAD + rows * HEIGHT
    moments = [at for chart in charts for line in chart.lines for at, _ in line.points]
    span = (min(moments, default=0.0), max(moments, default=1.0))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
        ' font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for number, chart in enumerate(charts):
        parts += _panel(chart, number % COLUMNS * WIDTH, HEAD + number // COLUMNS * HEIGHT, span)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(chart: Chart, x: int, y: int, span: tuple[float, float]) -> list[str]:
    lines = [line for line in chart.lines if line.points][:MAX_LINES]
    top = max((value for line in lines for _, value in line.points), default=0.0) or 1.0
    left, right, high, low = x + LEFT, x + WIDTH - RIGHT, y + TOP, y + HEIGHT - BOTTOM
    seconds = (span[1] - span[0]) or 1.0
    parts = [
        f'<text x="{x + 8}" y="{y + 16}" font-size="11" font-weight="bold">{escape(chart.title)}</text>',
        f'<path d="M{left} {high}H{right}M{left} {(high + low) // 2}H{right}M{left} {low}H{right}" stroke="#dddddd"/>',
        f'<text x="{left - 4}" y="{high + 4}" text-anchor="end">{shown(top, chart.unit)}</text>',
        f'<text x="{left - 4}" y="{low + 4}" text-anchor="end">0</text>',
    ]
    for colour, line in zip(COLOURS, lines, strict=False):
        places = " ".join(
            f"{left + (right - left) * (at - span[0]) / seconds:.0f},{low - (low - high) * value / top:.1f}"
            for at, value in line.points
        )
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
    return [*parts, *_legend([line.name for line in lines], left, right, low + 16)]


def _legend(names: Sequence[str], x: int, right: int, y: int) -> list[str]:
    """Write as many names as there is room for."""
    parts = []
    for colour, name in zip(COLOURS, names, strict=False):
        if name and x + LETTER * len(name) < right:
            parts.append(f'<text x="{x}" y="{y}" fill="{colour}">{escape(name)}</text>')
            x += LETTER * len(name) + 10
    return parts


def shown(value: float, unit: str) -> str:
    """Return a value in its unit, in few characters."""
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value / 1000:.3g} k" if value >= 1000 else f"{value:.3g}"
