"""A run as it is kept: what was sent where, the figures, the histograms, and which thresholds held. JSON and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from load_tests.generator.fields import ScenarioError
from load_tests.generator.scenario import Scenario
from load_tests.generator.tally import Tally
from load_tests.generator.threshold import Threshold

FORMAT = 2
FILE = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What became of one threshold."""

    threshold: str
    value: float | None
    holds: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    scenario: str
    about: str
    seed: int
    target: str
    call: str
    arrivals: str
    """In words."""
    date: str
    machine: str
    load_before: float
    """The machine's load average when the run began."""
    is_whole: bool
    """False for a run that was stopped early."""
    arrivals_s: float
    figures: Mapping[str, float | None]
    verdicts: tuple[Verdict, ...]
    table: Mapping[str, Any]
    """The scenario as it was run, changes included."""
    tally: Tally

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    def to_json(self) -> dict[str, Any]:
        plain = {name: getattr(self, name) for name in self.__slots__}
        verdicts = [{name: getattr(verdict, name) for name in verdict.__slots__} for verdict in self.verdicts]
        return {"format": FORMAT, **plain, "verdicts": verdicts, "tally": self.tally.to_json()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Raises ScenarioError for another format."""
        value = dict(value)
        if value.pop("format", None) != FORMAT:
            raise ScenarioError("this is not a report of this release")
        verdicts = tuple(Verdict(**each) for each in value["verdicts"])
        return cls(**{**value, "verdicts": verdicts, "tally": Tally.from_json(value["tally"])})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the report in `path`, a file or the directory of a run. Raises ScenarioError."""
        file = path / FILE if path.is_dir() else path
        try:
            return cls.from_json(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ScenarioError(f"{file} is not a report: {error}") from error


def judge(thresholds: tuple[str, ...], figures: Mapping[str, float | None]) -> tuple[Verdict, ...]:
    """Return what becomes of each threshold."""
    parsed = [Threshold.parse(text) for text in thresholds]
    return tuple(Verdict(threshold=str(each), value=figures[each.figure], holds=each.holds(figures)) for each in parsed)


def describe_arrivals(scenario: Scenario) -> str:
    """Return in words when requests arrive."""
    arrivals = scenario.arrivals
    ways = {
        "constant": f"{arrivals.rate:g} a second, evenly",
        "poisson": f"{arrivals.rate:g} a second, Poisson",
        "bursts": f"{arrivals.rate:g} a second, in bursts of {arrivals.size}",
        "ramp": f"{arrivals.from_rate:g} to {arrivals.rate:g} a second, Poisson",
        "trace": f"{arrivals.file}, {arrivals.speed:g} times as fast",
        "closed": f"{arrivals.concurrency} users, closed loop",
    }
    return f"{ways[arrivals.process]}, for {arrivals.duration_s:g} s"
