"""A report as text for a terminal: what was asked, what came, how long it took, what failed, what held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from load_tests.generator.figures import COUNTS, PERCENTILES, TIMES
from load_tests.generator.plot import number, seconds
from load_tests.generator.report import Report
from load_tests.generator.tally import Group

MAX_LAG_S = 0.01
"""A generator that sends later than this is part of what it measures."""
_POINTS = ("mean", *PERCENTILES, "max")


def shown(figure: str, value: float | None) -> str:
    """Return one figure as people write it."""
    if value is None:
        return "-"
    if figure.endswith("_share") and figure != "generator_cpu_share":
        return f"{100 * value:.1f} %"
    if "_s." in figure or figure == "duration_s":
        return seconds(value)
    return number(value)


def text_table(report: Report) -> str:
    """Return the whole report, lines ended."""
    figures = report.figures
    head = [
        f"{report.scenario}: {report.arrivals}, over {report.call} to {report.target}",
        f"{report.date}, seed {report.seed}, {report.machine}, load average {report.load_before:g} before",
    ]
    if not report.is_whole:
        head.append("stopped early: what follows is what there was")
    sections = [
        "\n".join(head),
        _aligned([[name, shown(name, figures[name]), what] for name, what in COUNTS.items()]),
        _aligned([["seconds", *_POINTS], *_times(figures)], right=True),
        _groups("kind", report.tally.kinds),
        _groups("tenant", report.tally.tenants) if len(report.tally.tenants) > 1 else "",
        _aligned([["error", "requests"], *([name, str(n)] for name, n in report.tally.errors.most_common())]),
        _replicas(report),
        _verdicts(report),
        *warnings(report),
    ]
    if not report.tally.errors:
        sections.remove(_aligned([["error", "requests"]]))
    return "\n\n".join(section for section in sections if section) + "\n"


def warnings(report: Report) -> Iterator[str]:
    """Yield what speaks against believing the figures."""
    lag, share = report.figures["lag_s.p99"], report.figures["generator_cpu_share"]
    if lag is not None and lag > MAX_LAG_S:
        yield (
            f"The generator sent up to {seconds(lag)} late (p99). That is counted in every time above; a quieter "
            "machine or more processes would tell how much of it is the target's."
        )
    if share is not None and share > 0.8:
        yield f"The busiest process of the generator used {100 * share:.0f} % of a core: give it more processes."


def _times(figures: Mapping[str, float | None]) -> Iterator[list[str]]:
    for name in TIMES:
        if figures[f"{name}.p50"] is not None:
            yield [name, *(shown(f"{name}.{point}", figures[f"{name}.{point}"]) for point in _POINTS)]


def _groups(what: str, groups: Mapping[str, Group]) -> str:
    rows = [[what, "sent", "ok", "good", "cancelled", "refused", "failed", "tokens", "first p50", "first p99"]]
    for name, group in sorted(groups.items()):
        counts = (group.sent, group.ok, group.good, group.cancelled, group.refused, group.failed, group.tokens)
        points = (group.first_token.percentile(0.5), group.first_token.percentile(0.99))
        rows.append([name, *map(str, counts), *("-" if each is None else seconds(each) for each in points)])
    return _aligned(rows, right=True)


def _replicas(report: Report) -> str:
    rows = [["replica", "requests", "prompt", "cached", "generated", "computed"]]
    for name, share in sorted(report.tally.replicas.items()):
        counts = (share.requests, share.prompt_tokens, share.cached_tokens, share.generated_tokens, share.load)
        rows.append([name, *map(str, counts)])
    return _aligned(rows, right=True) if len(rows) > 1 else ""


def _verdicts(report: Report) -> str:
    rows = [
        ["holds" if each.holds else "BROKEN", each.threshold, f"is {shown(each.threshold.split()[0], each.value)}"]
        for each in report.verdicts
    ]
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Return rows in columns: the first to the left, the others to the right if `right`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right and position else cell.ljust(width)
            for position, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
