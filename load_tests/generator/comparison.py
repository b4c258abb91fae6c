"""Two reports side by side: each figure, and by how much the second is better or worse than the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from load_tests.generator.figures import FIGURES
from load_tests.generator.report import Report
from load_tests.generator.text_table import shown

COMPARED = (
    "sent", "ok", "errors", "late", "requests_per_s", "goodput_per_s", "good_share", "tokens_per_s", "cached_share",
    "computed_prompt_tokens", "balance",
    *(f"{time}.{point}" for time in ("first_token_s", "per_token_s", "gap_s", "total_s") for point in ("p50", "p99")),
    "age_s.p99", "lag_s.p99",
)  # fmt: skip
_MORE_IS_BETTER = frozenset({"requests_per_s", "goodput_per_s", "good_share", "tokens_per_s", "cached_share"})
_NO_JUDGEMENT = frozenset({"sent", "ok"})
assert set(COMPARED) <= set(FIGURES)


@dataclass(frozen=True, slots=True)
class Change:
    """One figure of two reports. `ratio` is second / first, None where that says nothing."""

    figure: str
    first: float | None
    second: float | None

    @property
    def ratio(self) -> float | None:
        return self.second / self.first if self.first and self.second is not None else None

    def worsening(self) -> float:
        """Return by which part the second is worse: 0.1 for 10 %, negative where it is better, 0 if nobody can say.
        Something bad that was not there at all before is infinitely worse."""
        if self.figure in _NO_JUDGEMENT or self.first is None or self.second is None:
            return 0.0
        if self.first == 0:
            return float("inf") if self.second > 0 and self.figure not in _MORE_IS_BETTER else 0.0
        change = self.second / self.first - 1
        return -change if self.figure in _MORE_IS_BETTER else change


def compare(first: Report, second: Report) -> list[Change]:
    """Return the change of each compared figure."""
    return [Change(figure, first.figures[figure], second.figures[figure]) for figure in COMPARED]


def comparison_table(first: Report, second: Report, changes: Sequence[Change], *, tolerance: float) -> str:
    """Return the comparison as text; what is worse by more than `tolerance` is marked."""
    rows = [["figure", "A", "B", "B / A", ""]]
    for change in changes:
        ratio = "-" if change.ratio is None else f"{change.ratio:.3g}"
        mark = "worse" if change.worsening() > tolerance else "better" if change.worsening() < -tolerance else ""
        cells = (shown(change.figure, change.first), shown(change.figure, change.second), ratio, mark)
        rows.append([change.figure, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*_heads(first, second), "", *lines]) + "\n"


def _heads(first: Report, second: Report) -> Iterator[str]:
    for name, report in (("A", first), ("B", second)):
        yield f"{name}  {report.date}  {report.scenario}, seed {report.seed}: {report.arrivals}, over {report.call}"
    if first.table != second.table:
        yield "The two did not run the same scenario."
