"""The pictures of docs/: dashboards as Prometheus answers their queries, and a trace as a tracing back end shows it.

    python -m load_tests.rigs.telemetry_pictures [FOLDER]

One cluster for a minute, with load that comes, grows and goes, errors and a replica that dies. Needs `prometheus`; for
the trace Phoenix and `chromium`, without which that picture stays as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from octavo.names import Span

from load_tests import phoenix
from load_tests.panel_chart import Chart, Line, draw
from load_tests.phoenix import Phoenix
from load_tests.prometheus import OBSERVABILITY, Prometheus, Question, panel_questions, scraping
from load_tests.rigs.elastic_cluster import serving
from load_tests.rigs.telemetry_load import CONFIG, Load, kill

DOCS = Path(__file__).parents[2] / "docs"
STEP_S = 1.0
TRACED = 0.2
"""Of all requests: the back end stores spans slowly."""
ARRIVE_S = 60.0
BROWSER_S = 60.0
PIXELS = "1300,620"


async def main(folder: Path) -> None:
    with ExitStack() as scope:
        data = Path(scope.enter_context(tempfile.TemporaryDirectory(prefix="octavo-bench-")))
        backend = scope.enter_context(phoenix.receiving(data)) if phoenix.is_installed() else None
        variables = {} if backend is None else {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": backend.endpoint}
        async with serving(CONFIG, variables=variables) as cluster:
            prometheus = scope.enter_context(scraping(cluster.ready["metrics"], data))
            begin = time.time()
            trace_ids = await load_for_a_minute(cluster.address, cluster.ready["replicas"][0]["pid"])
            await asyncio.to_thread(draw_dashboards, prometheus, begin, folder)
        if backend is not None and shutil.which("chromium"):
            await asyncio.to_thread(show_trace, backend, trace_ids, folder / "trace.png", data)


async def load_for_a_minute(address: str, replica: int) -> list[str]:
    """Return the traces of what was answered."""
    trace_ids = []
    async with Load(address, traced=TRACED) as load:
        await asyncio.sleep(12)
        await load.go_wrong()
        async with Load(address, seed=2, traced=TRACED) as more:
            await asyncio.sleep(8)
            kill(replica)
            await asyncio.sleep(15)
            await more.go_wrong()
            trace_ids += more.trace_ids
        await asyncio.sleep(10)
        trace_ids += load.trace_ids
    await asyncio.sleep(10)
    return trace_ids


def draw_dashboards(prometheus: Prometheus, begin: float, folder: Path) -> None:
    end = time.time()
    for path in sorted((OBSERVABILITY / "grafana/dashboards").glob("*.json")):
        dashboard = json.loads(path.read_text())
        units = {panel["title"]: panel["fieldConfig"]["defaults"]["unit"] for panel in dashboard["panels"]}
        lines: dict[str, list[Line]] = {}
        for question in panel_questions():
            if question.where == path.stem:
                found = _lines(prometheus, question, begin, end)
                lines.setdefault(question.title, []).extend(found)
        charts = [Chart(name, units[name], drawn) for name, drawn in lines.items()]
        (folder / f"{path.stem}.svg").write_text(draw(dashboard["title"], charts))


def _lines(prometheus: Prometheus, question: Question, begin: float, end: float) -> Iterator[Line]:
    for series in prometheus.ask_range(question.expression, begin, end, STEP_S):
        yield Line(_named(question.legend, series.labels), series.points)


def _named(legend: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        legend = legend.replace("{{" + name + "}}", value)
    return legend


def show_trace(backend: Phoenix, trace_ids: list[str], picture: Path, data: Path) -> None:
    """Take a picture of the page of a request that a second replica finished, if there is one."""
    trace_id = _resumed(backend, trace_ids)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options = {
        "window-size": PIXELS,
        "user-data-dir": str(data / "browser"),
        "virtual-time-budget": "15000",
        "screenshot": str(picture.absolute()),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    subprocess.run([*command, *flags, backend.page(trace_id)], timeout=BROWSER_S, check=True, capture_output=True)


def _resumed(backend: Phoenix, trace_ids: Sequence[str]) -> str:
    """Return the trace with the most attempts, once all are there or `ARRIVE_S` are over."""
    give_up = time.monotonic() + ARRIVE_S
    while True:
        traces = backend.traces()
        if traces.keys() >= set(trace_ids) or time.monotonic() > give_up:
            attempts = {each: Counter(span.name for span in traces.get(each, ())) for each in trace_ids}
            return max(attempts, key=lambda each: attempts[each][Span.DISPATCH])
        time.sleep(1.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.telemetry_pictures")
    parser.add_argument("folder", nargs="?", type=Path, default=DOCS)
    asyncio.run(main(parser.parse_args().folder))
