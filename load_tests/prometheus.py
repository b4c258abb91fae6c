"""A real Prometheus as a child process: scrapes a cluster as deploy/observability says, and answers queries.

What is asked of it are the queries of the dashboards and rules there, as a user's Grafana and Prometheus ask them.
Needs the program `prometheus` (a package of Debian's).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from load_tests.server import ServerProcess, free_port

OBSERVABILITY = Path(__file__).parents[1] / "deploy/observability"
START_S = 30.0
QUERY_S = 10.0
SCRAPE_S = 2
"""And how long a scrape may take: processors may be busy with the load."""
WINDOW = "20s"
"""For rates of panels, where Grafana has $__rate_interval."""


@dataclass(frozen=True, slots=True)
class Question:
    """A query of a dashboard's panel or of a rule."""

    where: str
    """The dashboard, or "alerts"."""
    title: str
    expression: str
    """With the dashboard's variables set to everything."""
    legend: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.title}: {self.expression}"


@dataclass(frozen=True, slots=True)
class Series:
    labels: dict[str, str]
    points: tuple[tuple[float, float], ...]
    """Seconds since 1970 and the value; of an instant query one."""


def panel_questions() -> Iterator[Question]:
    """Yield what the dashboards ask, in their order."""
    for path in sorted((OBSERVABILITY / "grafana/dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", WINDOW)
                expression = re.sub(r"\$(model|tenant)", ".*", expression)
                yield Question(path.stem, panel["title"], expression, target["legendFormat"])


def rule_questions() -> Iterator[Question]:
    """Yield what is measured for alerts: the recorded series. Alerts only compare those."""
    for group in _load("alerts.yml")["groups"]:
        for rule in group["rules"]:
            if "record" in rule:
                yield Question("alerts", rule["record"], rule["record"])


class Prometheus:
    def __init__(self, port: int) -> None:
        self.address = f"http://127.0.0.1:{port}"

    def ask(self, expression: str) -> list[Series]:
        """Return what a query gives now; nothing is a number that is not one."""
        found = self._get("query", query=expression)["result"]
        series = [Series(each["metric"], _points([each["value"]])) for each in found]
        return [each for each in series if each.points]

    def ask_range(self, expression: str, begin: float, end: float, step_s: float) -> list[Series]:
        found = self._get("query_range", query=expression, start=begin, end=end, step=step_s)["result"]
        return [Series(each["metric"], _points(each["values"])) for each in found]

    def names(self) -> set[str]:
        """Return the names of all series."""
        return set(self._get("label/__name__/values"))

    def alerts(self) -> dict[str, str]:
        """Return the state of every alert that is pending or firing."""
        return {each["labels"]["alertname"]: each["state"] for each in self._get("alerts")["alerts"]}

    def _get(self, what: str, **parameters: object) -> Any:
        url = f"{self.address}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=QUERY_S) as answer:
            return json.load(answer)["data"]


def is_installed() -> bool:
    return shutil.which("prometheus") is not None


@contextmanager
def scraping(target: str, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus for the scope, its data in `folder`, that scrapes `target`, a URL that a cluster announced as its
    metrics: with the configuration and rules of deploy/observability, but every `SCRAPE_S`."""
    config = _load("prometheus.yml")
    config["global"] = {"scrape_interval": f"{SCRAPE_S}s", "evaluation_interval": f"{SCRAPE_S}s"}
    config["rule_files"] = [str(OBSERVABILITY / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [urllib.parse.urlsplit(target).netloc]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    command = [
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    server = ServerProcess(command, {}, folder / "prometheus.log")
    try:
        found = Prometheus(port)
        server.await_http(f"{found.address}/-/ready", START_S)
        yield found
    finally:
        server.stop()


def _load(name: str) -> Any:
    return yaml.safe_load((OBSERVABILITY / name).read_text())


def _points(values: list[list[Any]]) -> tuple[tuple[float, float], ...]:
    points = ((float(at), float(value)) for at, value in values)
    return tuple((at, value) for at, value in points if math.isfinite(value))
