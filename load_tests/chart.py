"""Measurements as a picture: one SVG, a panel for each figure, a bar for each workload. Pure; no library.

Every panel has a scale of its own: output tokens a second of one workload say nothing about another's first token.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from load_tests.measurement import Measurement

PANELS = (
    ("output_tokens_per_s", "output tokens/s"),
    ("requests_per_s", "requests/s"),
    ("first_token_p50_ms", "first token, p50, ms"),
    ("per_token_p50_ms", "per token, p50, ms"),
)
WIDTH, PANEL_HEIGHT, LEFT, BAR, GAP, TOP = 720, 138, 70, 18, 8, 30
FULL = WIDTH - LEFT - 90
"""Length of the longest bar of a panel; its number stands behind it."""


def draw(measurements: Sequence[Measurement], title: str) -> str:
    """Return the document."""
    height = TOP + PANEL_HEIGHT * len(PANELS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for number, (figure, heading) in enumerate(PANELS):
        values = [(each.workload, float(getattr(each, figure))) for each in measurements]
        parts += _panel(values, heading, TOP + number * PANEL_HEIGHT)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(values: Sequence[tuple[str, float]], heading: str, top: int) -> list[str]:
    largest = max((value for _, value in values), default=0.0) or 1.0
    parts = [f'<text x="{LEFT}" y="{top + 16}" fill="#555555">{escape(heading)}</text>']
    for row, (name, value) in enumerate(values):
        y = top + 24 + row * (BAR + GAP)
        length = round(FULL * value / largest, 1)
        middle = y + BAR - 5
        parts += [
            f'<text x="{LEFT - 8}" y="{middle}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{length}" height="{BAR}" fill="#3b6ea5"/>',
            f'<text x="{LEFT + length + 6}" y="{middle}">{value:.4g}</text>',
        ]
    return parts
