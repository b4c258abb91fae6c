"""Figures, reports as JSON, text and page, comparisons, and the search for a rate."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from load_tests.generator.comparison import Change, compare, comparison_table
from load_tests.generator.crew import Progress
from load_tests.generator.fields import ScenarioError
from load_tests.generator.figures import FIGURES, compute_figures
from load_tests.generator.page import html_page
from load_tests.generator.plot import Axis, linear_axis, log_axis, number, seconds
from load_tests.generator.progress import render
from load_tests.generator.report import Report, judge
from load_tests.generator.search import search_max_rate
from load_tests.generator.tally import MAX_GROUPS, OTHERS, Group, Tally
from load_tests.generator.text_table import text_table


def tally_of(seed: int, requests: int = 100) -> Tally:
    """What a process might have counted: each tenth request fails, the rest take 10 ms to 1 s."""
    rng = random.Random(seed)
    tally = Tally(interval_s=0.5)
    for count in range(requests):
        at_s = count / 20
        groups = tally.groups("<chat>", f"tenant-{count % 3}", at_s)
        for group in groups:
            group.sent += 1
        if count % 10 == 9:
            tally.error("UNAVAILABLE/NO_REPLICA")
            for group in groups:
                group.failed += 1
            continue
        first, total = rng.uniform(0.01, 0.1), rng.uniform(0.1, 1.0)
        for group in groups:
            group.ok += 1
            group.good += total < 0.5
            group.tokens += 8
            group.first_token.add(first)
            group.total.add(total)
        tally.arrive(8, at_s + total)
        tally.per_token.add((total - first) / 7)
        tally.gap.add(total / 8)
        tally.lag.add(1e-4)
        share = tally.replica(f"replica-{count % 2}")
        share.requests += 1
        share.prompt_tokens += 100
        share.cached_tokens += 75
        share.generated_tokens += 8
        tally.prompt_tokens += 100
        tally.cached_tokens += 75
        tally.last_end_s = at_s + total
    return tally


def report_of(tally: Tally, **changes: Any) -> Report:
    figures = compute_figures(tally, arrivals_s=5.0, cpu_s=[0.2], replicas=["replica-0", "replica-1"])
    values: dict[str, Any] = {
        "scenario": "toy", "about": "<b>a & b</b>", "seed": 1, "target": "127.0.0.1:1", "call": "session",
        "arrivals": "20 a second", "date": "2026-01-01 00:00:00", "machine": "x, 2 cores", "load_before": 0.5,
        "is_whole": True, "arrivals_s": 5.0, "figures": figures, "table": {"name": "toy"}, "tally": tally,
        "verdicts": judge(("errors == 0", "cached_share >= 0.5"), figures),
    }  # fmt: skip
    return Report(**(values | changes))


def test_figures_are_what_was_counted() -> None:
    tally = tally_of(1)
    figures = compute_figures(tally, arrivals_s=5.0, cpu_s=[0.1, 0.3], replicas=["replica-0", "replica-1", "idle"])
    assert set(figures) == set(FIGURES)
    assert (figures["sent"], figures["ok"], figures["errors"], figures["error_share"]) == (100, 90, 10, 0.1)
    assert figures["cached_share"] == 0.75
    assert figures["tokens_per_s"] == pytest.approx(720 / tally.last_end_s)
    assert figures["generator_cpu_us_per_token"] == pytest.approx(0.4e6 / 720)
    # Number 9, 19, ... fail, all of them of replica-1: 50 and 40 requests of 33 tokens each, over three replicas.
    assert figures["balance"] == pytest.approx(50 * 3 / 90)
    assert figures["first_token_s.p50"] == tally.all.first_token.percentile(0.5)
    assert figures["age_s.p99"] is None


def test_no_requests_give_no_figures_but_no_error_either() -> None:
    tally = Tally(interval_s=1)
    figures = compute_figures(tally, arrivals_s=1.0, cpu_s=[], replicas=[])
    assert figures["sent"] == 0
    assert figures["first_token_s.p50"] is figures["cached_share"] is figures["balance"] is None
    assert "nothing was measured" in html_page(report_of(tally))
    assert "toy" in text_table(report_of(tally))


def test_merging_processes_is_the_same_as_one() -> None:
    both, second = tally_of(1), tally_of(2)
    both.merge(Tally.from_json(json.loads(json.dumps(second.to_json()))))
    assert both.all.sent == 200
    assert both.all.ok == sum(group.ok for group in both.kinds.values()) == sum(g.ok for g in both.tenants.values())
    assert both.errors["UNAVAILABLE/NO_REPLICA"] == 20
    assert both.all.first_token.count == 180
    assert sum(both.arrived.values()) == both.all.tokens == 2 * 720
    assert both.replicas["replica-0"].requests == 100
    assert both.last_end_s == max(tally_of(1).last_end_s, second.last_end_s)


def test_memory_is_bounded_in_tenants_reasons_replicas_and_time() -> None:
    tally = Tally(interval_s=0.1)
    for count in range(1_000):
        tally.groups("kind", f"tenant-{count}", count * 10.0)[3].sent += 1
        tally.error(f"REASON_{count}")
        tally.replica(f"replica-{count}").requests += 1
        tally.arrive(1, count * 10.0)
    for names in (tally.tenants, tally.errors, tally.replicas):
        assert len(names) == MAX_GROUPS + 1
        assert OTHERS in names
    assert max(len(tally.intervals), len(tally.arrived)) <= 120
    assert sum(group.sent for group in tally.tenants.values()) == sum(tally.errors.values()) == 1_000


def test_a_report_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    report = report_of(tally_of(1))
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report.to_json()))
    for path in (file, tmp_path):
        again = Report.read(path)
        assert json.dumps(again.to_json()) == file.read_text()
        assert again.figures == report.figures
        assert text_table(again) == text_table(report)
        assert html_page(again) == html_page(report)
    file.write_text('{"format": 99}')
    with pytest.raises(ScenarioError, match="not a report of this release"):
        Report.read(tmp_path)
    with pytest.raises(ScenarioError, match="is not a report"):
        Report.read(tmp_path / "nothing.json")


def test_thresholds_decide() -> None:
    report = report_of(tally_of(1))
    assert [verdict.holds for verdict in report.verdicts] == [False, True]
    assert not report.holds
    text = text_table(report)
    assert re.search(r"BROKEN\s+errors == 0\s+is 10", text)
    assert re.search(r"holds\s+cached_share >= 0.5\s+is 75.0 %", text)


def test_the_table_says_what_speaks_against_believing_it() -> None:
    tally = tally_of(1)
    assert "late" not in text_table(report_of(tally)).split("BROKEN")[1]
    tally.lag.add(0.5)
    assert re.search(r"The generator sent up to \d+ ms late \(p99\)", text_table(report_of(tally)))
    assert "stopped early" in text_table(report_of(tally, is_whole=False))


def test_the_page_is_whole_by_itself_and_well_formed() -> None:
    page = html_page(report_of(tally_of(1)))
    assert not re.search(r"https?://|<script|<link|<img|@import|url\(|src=", page)
    assert "prefers-color-scheme: dark" in page
    assert "<b>a & b</b>" not in page
    assert "&lt;chat&gt;" in page
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(pictures) == 5
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        for mark in root.iter():
            for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "width", "height"):
                value = mark.get(name)
                assert value is None or -1 <= float(value) <= 700, f"{name}={value}"
    for tag in ("table", "div", "figure", "svg", "p", "h2"):
        assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_axes_have_round_ticks_within_their_bounds() -> None:
    for axis in (linear_axis([0.3, 17.2]), linear_axis([]), log_axis([1e-3, 5.0]), log_axis([1e-6, 1e2]), log_axis([])):
        ticks = list(axis.ticks())
        assert 2 <= len(ticks) <= 12
        assert all(axis.low <= tick <= axis.high * 1.001 for tick in ticks)
    assert Axis(0, 10, number).place(5) == 0.5
    assert Axis(1e-3, 1e3, seconds, is_log=True).place(1) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (12e-6, "12 µs"), (0.0123, "12.3 ms"), (1.0, "1 s"), (75.0, "75 s")]
)
def test_durations_are_written_as_people_do(value: float, text: str) -> None:
    assert seconds(value) == text


def with_figures(report: Report, changes: Mapping[str, float]) -> Report:
    return report_of(report.tally, figures={**report.figures, **changes})


def test_a_comparison_knows_which_way_is_better() -> None:
    first = report_of(tally_of(1))
    second = with_figures(first, {"first_token_s.p50": 1.0, "goodput_per_s": 1e6, "late": 3.0})
    changes = {change.figure: change for change in compare(first, second)}
    assert changes["first_token_s.p50"].worsening() > 5
    assert changes["goodput_per_s"].worsening() < -5
    assert changes["late"].worsening() == float("inf")
    assert changes["tokens_per_s"].worsening() == 0
    assert Change("age_s.p99", None, 1.0).worsening() == 0
    table = comparison_table(first, second, list(changes.values()), tolerance=0.1)
    assert re.search(r"first_token_s.p50 .* worse\n", table)
    assert re.search(r"goodput_per_s .* better\n", table)
    assert "did not run the same scenario" not in table


@pytest.mark.parametrize("limit", [0.7, 10.0, 37.0, 900.0])
async def test_the_search_finds_the_highest_rate_that_holds(limit: float) -> None:
    tried: list[float] = []

    async def trial(rate: float) -> bool:
        tried.append(rate)
        return rate <= limit

    found = await search_max_rate(trial, start=20.0, precision=0.05)
    assert found.holds is not None
    assert found.holds <= limit <= found.holds * 1.05
    assert len(tried) <= 16


async def test_the_search_gives_up_where_nothing_holds() -> None:
    async def trial(rate: float) -> bool:
        return False

    found = await search_max_rate(trial, start=20.0)
    assert found.holds is None
    assert found.breaks == pytest.approx(20 / 2**15)


def test_progress_is_one_picture() -> None:
    every = Group(sent=12, ok=10)
    every.first_token.add(0.25)
    table = render("toy", 30.0, Progress(elapsed_s=2.0, num_open=2, num_tokens=400, all=every))
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["12", "2", "10", "0", "0", "0", "5", "200", "250 ms", "250 ms", "-"]
