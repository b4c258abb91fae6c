"""What contestants did, as values: figures of each start, and their medians over the repetitions. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from load_tests.measurement import Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One contestant in one repetition; `failure` says why it has no figures, or not all."""

    contestant: str
    family: str
    repetition: int
    began: str = ""
    """Date and time of its start."""
    load_before: float
    """Of the last minute, that of the contestant before included."""
    busy_before: float
    """Cores that were busy although no contestant ran."""
    ready_s: float | None = None
    """From the start of its command until it answers."""
    first_answer_s: float | None = None
    """Of the first request of all, with one token."""
    peak_tree_bytes: int | None = None
    peak_replica_bytes: int | None = None
    cpu_s: dict[str, dict[str, float]] = field(default_factory=dict)
    """By workload: processor seconds of the engine's threads, of the rest of the server, of the driver."""
    measurements: Sequence[Measurement] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Medians:
    """All repetitions of one contestant."""

    runs: Sequence[Run]

    def speed(self, workload: str, unit: str) -> float | None:
        """Return output tokens or requests a second ("tokens", "requests")."""
        figure = "output_tokens_per_s" if unit == "tokens" else "requests_per_s"
        return _median(getattr(measurement, figure) for measurement in self._of(workload))

    def first_token_ms(self, workload: str) -> float | None:
        return _median(measurement.first_token_p50_ms for measurement in self._of(workload))

    def most_cached(self, workload: str) -> int | None:
        """Return the cached tokens of the repetition with the most of them."""
        counts = [each.cached_tokens for each in self._of(workload) if each.cached_tokens is not None]
        return max(counts, default=None)

    def share_of_others(self, workload: str) -> float | None:
        """Return which part of the server's processor time is not the engine's."""
        spent = [run.cpu_s[workload] for run in self.runs if workload in run.cpu_s]
        return _median(each["others"] / (each["engine"] + each["others"]) for each in spent if each["engine"])

    @property
    def family(self) -> str:
        return self.runs[0].family if self.runs else ""

    @property
    def failure(self) -> str | None:
        """Return what went wrong first."""
        return next((run.failure for run in self.runs if run.failure is not None), None)

    @property
    def ready_s(self) -> float | None:
        return _median(run.ready_s for run in self.runs)

    @property
    def peak_tree_bytes(self) -> int | None:
        return max((run.peak_tree_bytes for run in self.runs if run.peak_tree_bytes is not None), default=None)

    @property
    def peak_replica_bytes(self) -> int | None:
        return max((run.peak_replica_bytes for run in self.runs if run.peak_replica_bytes is not None), default=None)

    def _of(self, workload: str) -> list[Measurement]:
        return [each for run in self.runs for each in run.measurements if each.workload == workload]


def by_contestant(runs: Iterable[Run]) -> dict[str, Medians]:
    """Return the runs of each contestant, in the order of their first ones."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.contestant, []).append(run)
    return {name: Medians(each) for name, each in grouped.items()}


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return statistics.median(known) if known else None
