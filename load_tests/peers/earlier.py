"""What an earlier bench found, read back, so that a contestant can be measured without measuring all others again.

Only for contestants whose ratios are far from their bars: those measured now and those measured then had other minutes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests.measurement import Measurement
from load_tests.peers.runs import Run


class EarlierError(Exception):
    """There is no earlier bench, or it cannot be put beside this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    runs: tuple[Run, ...] = ()
    verdicts: Mapping[str, Any] = field(default_factory=dict)
    """By contestant."""
    perplexity_increase: Mapping[str, float] = field(default_factory=dict)
    """By column."""
    starts: Mapping[str, Any] = field(default_factory=dict)

    def without(self, contestants: Collection[str]) -> Earlier:
        """Leave out the runs and verdicts of those that are measured anew."""
        return dataclasses.replace(
            self,
            runs=tuple(run for run in self.runs if run.contestant not in contestants),
            verdicts={name: verdicts for name, verdicts in self.verdicts.items() if name not in contestants},
        )


def read_earlier(path: Path, machine: Mapping[str, Any]) -> Earlier:
    """Read what `bench.report` wrote on this `machine`.

    Raises EarlierError: no such file, not a report, or one of another machine or of a smoke run.
    """
    try:
        report = json.loads(path.read_text())
        runs = tuple(_run(each) for each in report["runs"])
        told, is_smoke = dict(report["machine"]), report["is_smoke"]
        earlier = Earlier(
            runs=runs,
            verdicts=report["verdicts"],
            perplexity_increase=report["perplexity_increase"],
            starts=report["starts"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EarlierError(f"{path} is not the report of a bench: {error!r}") from error
    if is_smoke:
        raise EarlierError(f"{path} is of a smoke run")
    for key in ("processor", "cores", "instructions"):
        if told.get(key) != machine.get(key):
            raise EarlierError(f"{path} is of another machine: {key} is {told.get(key)!r}, here {machine.get(key)!r}")
    return earlier


def _run(fields: dict[str, Any]) -> Run:
    measurements = tuple(Measurement(**each) for each in fields.pop("measurements"))
    return Run(**fields, measurements=measurements)
