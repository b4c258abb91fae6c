"""A real Prometheus scrapes a cluster under load: every panel's and alert's query has data, every metric is there.

The load has what dashboards show when all is not well, too: errors, missed deadlines, a replica that dies, scaling.
Half a minute. Without the program `prometheus` its bars are missed, since nothing was measured.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from octavo.metrics import CATALOGUE, Metric

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes
from load_tests.prometheus import Prometheus, Question, is_installed, panel_questions, rule_questions, scraping
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import serving
from load_tests.rigs.telemetry_load import CONFIG, Load, kill

PATIENCE = 20
"""So many times what has no data yet is asked for again, with a second between; the load goes on meanwhile."""


class Survey:
    """What has had no answer so far, of all that dashboards and rules ask, and of all documented series."""

    def __init__(self, prometheus: Prometheus) -> None:
        self.panels = list(panel_questions())
        self.rules = list(rule_questions())
        self.series = set(expected())
        self._prometheus = prometheus

    def ask(self) -> bool:
        """Ask for that again; say whether there is nothing left."""
        self.panels, self.rules = self._unanswered(self.panels), self._unanswered(self.rules)
        self.series -= self._prometheus.names()
        return not (self.panels or self.rules or self.series)

    def _unanswered(self, questions: Iterable[Question]) -> list[Question]:
        return [each for each in questions if not self._prometheus.ask(each.expression)]


async def measure(settings: Settings, notes: Notes) -> None:
    if not is_installed():
        print("queries: the program `prometheus` is not installed", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        async with serving(CONFIG) as cluster:
            with scraping(cluster.ready["metrics"], Path(folder)) as prometheus:
                survey = Survey(prometheus)
                seconds = settings.seconds(8.0, 4.0)
                load = await strike(cluster.address, cluster.ready["replicas"][0]["pid"], seconds, survey.ask)
                note(survey, notes, dict(load.outcomes), prometheus.alerts())


async def strike(address: str, replica: int, seconds: float, is_seen: Callable[[], bool]) -> Load:
    """Load a cluster for a while, kill one of its replicas, given by its pid, and load it for as long again, and until
    `is_seen`, which may block, says so."""
    async with Load(address) as load:
        await asyncio.sleep(seconds)
        await load.go_wrong()
        kill(replica)
        await asyncio.sleep(seconds)
        await load.go_wrong()
        for _ in range(PATIENCE):
            if await asyncio.to_thread(is_seen):
                break
            await asyncio.sleep(1.0)
    return load


def note(survey: Survey, notes: Notes, outcomes: dict[str, int], alerts: dict[str, str]) -> None:
    notes.add(
        "queries",
        panels=len(list(panel_questions())),
        rules=len(list(rule_questions())),
        empty_panels=list(map(str, survey.panels)),
        empty_rules=list(map(str, survey.rules)),
        missing_metrics=sorted(survey.series),
        outcomes=outcomes,
        alerts=alerts,
    )


def expected() -> list[str]:
    """Return the names of all series that are documented, those of vLLM among them."""
    found = []
    for metric in CATALOGUE:
        found += series_names(metric, metric.text_name)
        if metric.alias:
            found += series_names(metric, metric.alias + ("_total" if "counter" in metric.kind else ""))
    return found


def series_names(metric: Metric, name: str) -> list[str]:
    return [name + suffix for suffix in ("_bucket", "_sum", "_count")] if metric.kind == "histogram" else [name]


def judge(notes: Notes) -> list[Bar]:
    return [
        _none(notes, "queries: of panels without data", "empty_panels", "panels"),
        _none(notes, "queries: of alerts without data", "empty_rules", "rules"),
        _none(notes, "queries: documented metrics that are not there", "missing_metrics", ""),
    ]


def _none(notes: Notes, bar: str, figure: str, whole: str) -> Bar:
    found = notes.of("queries", figure)
    missing = [name for names in found for name in names]
    detail = "; ".join(missing) or f"{notes.total('queries', whole) or ''} asked" * bool(whole)
    return at_most(bar, len(missing) if found else None, 0, detail)


if __name__ == "__main__":
    sys.exit(main("telemetry_queries", measure, judge))
