"""A report as one HTML page: tables and inline SVG, no script, nothing fetched from anywhere, for light and dark."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from html import escape

from load_tests.generator.figures import COUNTS, PERCENTILES, TIMES
from load_tests.generator.histogram import Histogram
from load_tests.generator.plot import Axis, Line, bar_plot, line_plot, linear_axis, log_axis, number, seconds
from load_tests.generator.report import Report
from load_tests.generator.tally import Group
from load_tests.generator.text_table import shown, warnings

MAX_ROWS = 40
_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #667079; --line: #d9dde1; --paper: #fff; --card: #f6f7f8;
  --c0: #2563c4; --c1: #c2570c; --c2: #14805e; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8ea; --faint: #98a2ab; --line: #363c42; --paper: #15181b;
  --card: #1d2125; --c0: #79aef5; --c1: #f2a05e; --c2: #5cc9a0; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 1360px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
p { margin: .3rem 0; } .faint, .none { color: var(--faint); } .bad { color: var(--bad); font-weight: 600; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: .6rem; margin: 1rem 0; }
.cards div { background: var(--card); border-radius: 8px; padding: .6rem .8rem; }
.cards b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.cards span { color: var(--faint); font-size: .82rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; background: var(--card); border-radius: 8px; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .2rem 1rem; font-weight: 600;
  margin-bottom: .3rem; }
.legend { font-weight: 400; font-size: .85rem; } .legend span { margin-left: .8rem; white-space: nowrap; }
.legend i { display: inline-block; width: .7rem; height: .7rem; border-radius: 2px; margin-right: .3rem; }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--faint); font-size: 11px; }
svg .end { text-anchor: end; } svg .mid { text-anchor: middle; } .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } .dot { fill: transparent; }
.dot:hover { fill: var(--ink); }
.s0 { stroke: var(--c0); } .s1 { stroke: var(--c1); } .s2 { stroke: var(--c2); }
.f0 { fill: var(--c0); } .f1 { fill: var(--c1); } .f2 { fill: var(--c2); }
.b0 { background: var(--c0); } .b1 { background: var(--c1); } .b2 { background: var(--c2); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .22rem .8rem .22rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--faint); } th:first-child, td:first-child, .words td, .words th { text-align: left; }
pre { background: var(--card); border-radius: 8px; padding: .8rem; overflow-x: auto; font-size: .82rem; }
"""
_CARDS = (
    "requests_per_s", "goodput_per_s", "tokens_per_s", "first_token_s.p50", "first_token_s.p99", "per_token_s.p50",
    "total_s.p99", "cached_share", "balance", "errors",
)  # fmt: skip


def html_page(report: Report) -> str:
    """Return the whole page."""
    title = escape(f"{report.scenario}: load test")
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head><body>\n{_body(report)}\n</body></html>\n"
    )


def _body(report: Report) -> str:
    figures, tally = report.figures, report.tally
    cards = "".join(f"<div><b>{shown(name, figures[name])}</b><span>{name}</span></div>" for name in _CARDS)
    counts = [[name, shown(name, figures[name]), what] for name, what in COUNTS.items()]
    points = ("mean", *PERCENTILES, "max")
    times = [
        [name, *(shown(f"{name}.{point}", figures[f"{name}.{point}"]) for point in points), what]
        for name, what in TIMES.items()
    ]
    replicas = [
        [
            name,
            *map(str, (share.requests, share.prompt_tokens, share.cached_tokens, share.generated_tokens, share.load)),
        ]
        for name, share in sorted(tally.replicas.items())
    ]
    errors = [[name, str(count)] for name, count in tally.errors.most_common()]
    return "\n".join(
        [
            *_head(report),
            f'<div class="cards">{cards}</div>',
            f'<div class="plots">{"".join(_plots(report))}</div>',
            _table("Times", ["", *points, ""], times),
            _table("Figures", ["", "", ""], counts),
            _table("Errors", ["reason", "requests"], errors),
            _table("Replicas", ["replica", "requests", "prompt", "cached", "generated", "computed"], replicas),
            _groups("Kinds", tally.kinds),
            _groups("Tenants", tally.tenants) if len(tally.tenants) > 1 else "",
            f"<h2>Scenario</h2><pre>{escape(json.dumps(report.table, indent=1, ensure_ascii=False))}</pre>",
        ]
    )


def _head(report: Report) -> Iterable[str]:
    yield f"<h1>{escape(report.scenario)}</h1><p>{escape(report.about)}</p>"
    yield f"<p>{escape(report.arrivals)}, over {escape(report.call)} to {escape(report.target)}</p>"
    yield (
        f'<p class="faint">{escape(report.date)} · seed {report.seed} · {escape(report.machine)} · load average '
        f"{report.load_before:g} before</p>"
    )
    if not report.is_whole:
        yield '<p class="bad">Stopped early: this is what there was.</p>'
    yield from (f'<p class="bad">{escape(warning)}</p>' for warning in warnings(report))
    rows = [
        ["holds" if each.holds else "BROKEN", each.threshold, shown(each.threshold.split()[0], each.value)]
        for each in report.verdicts
    ]
    if rows:
        yield _table("Thresholds", ["", "must be", "is"], rows, words=True)


def _plots(report: Report) -> Iterable[str]:
    tally = report.tally
    every = [
        ("first token", tally.all.first_token),
        ("per token", tally.per_token),
        ("end to end", tally.all.total),
    ]
    lines = [Line(name, list(_shares(histogram)), colour) for colour, (name, histogram) in enumerate(every)]
    durations = [x for line in lines for x, _ in line.points]
    yield line_plot("Requests answered within", lines, log_axis(durations), Axis(0, 1, lambda share: f"{share:.0%}"))
    yield _over_time(report, "First token over time", seconds, p50=_point(0.5), p99=_point(0.99))
    width = tally.interval_s
    yield _over_time(
        report,
        "Requests a second, by when they were due",
        number,
        sent=lambda group: group.sent / width,
        failed=lambda group: group.failed / width,
        good=lambda group: group.good / width,
    )
    arrived = [(i * width, count / width) for i, count in sorted(tally.arrived.items())]
    yield _by_time(report, "Output tokens a second", [Line("tokens", arrived, 2)], number)
    bars = [
        (
            name,
            (
                ("generated", float(share.generated_tokens)),
                ("prompt, computed", float(share.prompt_tokens - share.cached_tokens)),
                ("prompt, cached", float(share.cached_tokens)),
            ),
        )
        for name, share in sorted(tally.replicas.items())
    ]
    yield bar_plot("Tokens by replica", bars[:MAX_ROWS])


def _shares(histogram: Histogram) -> Iterable[tuple[float, float]]:
    for value, below in histogram.curve():
        yield value, below / histogram.count


def _point(share: float) -> Callable[[Group], float | None]:
    return lambda group: group.first_token.percentile(share)


def _over_time(
    report: Report, label: str, shown: Callable[[float], str], **curves: Callable[[Group], float | None]
) -> str:
    tally, lines = report.tally, []
    for colour, (name, value) in enumerate(curves.items()):
        points = [(i * tally.interval_s, value(group)) for i, group in sorted(tally.intervals.items())]
        lines.append(Line(name.replace("_", " "), [(x, y) for x, y in points if y is not None], colour))
    return _by_time(report, label, lines, shown)


def _by_time(report: Report, label: str, lines: Sequence[Line], shown: Callable[[float], str]) -> str:
    heights = [y for line in lines for _, y in line.points]
    last_s = max(report.arrivals_s, report.tally.last_end_s)
    return line_plot(label, lines, linear_axis([last_s], seconds), linear_axis(heights, shown))


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    if not rows:
        return ""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows[:MAX_ROWS])
    kind = ' class="words"' if words else ""
    more = f'<p class="faint">and {len(rows) - MAX_ROWS} more</p>' if len(rows) > MAX_ROWS else ""
    return f'<h2>{escape(title)}</h2><div class="wide"><table{kind}><tr>{top}</tr>{body}</table></div>{more}'


def _cell(text: str) -> str:
    return f'<td class="bad">{text}</td>' if text == "BROKEN" else f"<td>{escape(text)}</td>"


def _groups(title: str, groups: dict[str, Group]) -> str:
    head = ["", "sent", "ok", "good", "cancelled", "refused", "failed", "tokens", "first token p50", "p99"]
    rows = []
    for name, group in sorted(groups.items()):
        counts = (group.sent, group.ok, group.good, group.cancelled, group.refused, group.failed, group.tokens)
        points = (group.first_token.percentile(0.5), group.first_token.percentile(0.99))
        rows.append([name, *map(str, counts), *("-" if each is None else seconds(each) for each in points)])
    return _table(title, head, rows)
