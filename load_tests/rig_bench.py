"""A bench that is made of rigs: each a command of its own under `rigs/` that holds a family of bars.

Writes NAME.json (the bars), NAME.txt (the same as a table) and NAME_runs.json (every run, the machine and its load) to
results/. Exit code 1 if a bar is not met. Ctrl-C and SIGTERM end it early: what was measured is judged, the rest misses
its bars. Some bars alone, or --quick, write nothing unless --results says where.

Arguments (ARGS="..."): --bars speed,latency; --repetitions; --quick; --results DIR.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from load_tests import machine
from load_tests.bars import Bar, exit_code, write_bars
from load_tests.notes import judge_terminals
from load_tests.peers.tables import print_bars

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
QUIET_CORES, QUIET_S = 0.2, 15.0
"""A family begins when fewer cores are busy, or after so many seconds; a quick one at once."""
STOP_S = 60.0
"""For a rig to judge what it has and to leave nothing behind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """`families`: names of bars to commands under rigs/. `name` is that of the results and of `make bench-NAME`."""

    name: str
    description: str
    families: Mapping[str, str]


@dataclass(slots=True)
class Outcome:
    bars: list[Bar] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    """Of all families, each with its "rig"."""
    reports: list[dict[str, Any]] = field(default_factory=list)
    is_whole: bool = True

    def take(self, report: dict[str, Any]) -> None:
        """Take in what a rig wrote."""
        runs = report.pop("runs")
        self.bars += [Bar(**bar) for bar in report.pop("bars")]
        self.runs += [{"rig": report["rig"], **run} for run in runs]
        self.reports.append(report)
        self.is_whole = self.is_whole and report["is_whole"]

    def miss(self, family: str, code: int) -> None:
        """A rig that wrote nothing misses its bars."""
        self.bars.append(Bar(f"{family}: measured", None, 1, ok=False, detail=f"ended with code {code}"))
        self.is_whole = False

    def judged(self) -> list[Bar]:
        """Return the bars, and that of terminal statuses unless no family that was run counts any."""
        return [*self.bars, judge_terminals(self.runs)] if any("sent" in run for run in self.runs) else self.bars


class Bench:
    """Runs families one after the other; `stop` ends the one that runs and starts no more."""

    def __init__(self, suite: Suite, *, repetitions: int, is_quick: bool) -> None:
        self._suite = suite
        self.outcome = Outcome()
        self._options = ["--repetitions", str(repetitions), *(["--quick"] if is_quick else [])]
        self._quiet_s = 0.0 if is_quick else QUIET_S
        self._is_stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, families: Sequence[str], folder: Path) -> None:
        for family in families:
            if self._is_stopped:
                self.outcome.is_whole = False
                return
            busy = machine.await_quiet(QUIET_CORES, self._quiet_s)
            print(f"bench-{self._suite.name}: {family} ({busy:g} cores busy)", flush=True)
            self._run(family, folder / f"{family}.json")

    def stop(self, *_: object) -> None:
        """A signal handler."""
        self._is_stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def _run(self, family: str, out: Path) -> None:
        # In a session of its own: Ctrl-C reaches it once, through `stop`.
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"load_tests.rigs.{self._suite.families[family]}",
                "--out",
                str(out),
                *self._options,
            ],
            cwd=ROOT,
            start_new_session=True,
        )
        try:
            code = self._await_end()
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        with suppress(OSError, ValueError):
            self.outcome.take(json.loads(out.read_text()))
            return
        self.outcome.miss(family, code)

    def _await_end(self) -> int:
        """Return the exit code; a rig that was told to stop has `STOP_S` for it."""
        assert self._process is not None
        give_up: float | None = None
        while (code := self._process.poll()) is None:
            if self._is_stopped and give_up is None:
                give_up = time.monotonic() + STOP_S
            if give_up is not None and time.monotonic() > give_up:
                return -signal.SIGKILL
            time.sleep(0.1)
        return code


def write(name: str, outcome: Outcome, bars: Sequence[Bar], results: Path) -> None:
    results.mkdir(parents=True, exist_ok=True)
    write_bars(bars, results / f"{name}.json")
    with (results / f"{name}.txt").open("w", encoding="utf-8") as file:
        print_bars(bars, Console(file=file, width=150))
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "is_whole": outcome.is_whole,
        "rigs": outcome.reports,
        "runs": outcome.runs,
    }
    (results / f"{name}_runs.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main(suite: Suite, argv: Sequence[str] | None = None) -> int:
    """Run a suite's command line; return its exit code."""
    names = ", ".join(suite.families)
    parser = argparse.ArgumentParser(prog=f"make bench-{suite.name}", description=suite.description)
    parser.add_argument("--bars", default=",".join(suite.families), help=f"of {names}; default: all")
    parser.add_argument("--repetitions", type=int, default=3, help="of what is compared, alternately")
    parser.add_argument("--quick", action="store_true", help="a second of each: shows that it works, measures little")
    parser.add_argument("--results", type=Path, help="a directory; default: results/ for all bars, else none")
    arguments = parser.parse_args(argv)
    families = arguments.bars.split(",")
    if unknown := [family for family in families if family not in suite.families]:
        parser.error(f"--bars must be of {names}; {unknown[0]!r} is not")
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be >= 1, is {arguments.repetitions}")
    bench = Bench(suite, repetitions=arguments.repetitions, is_quick=arguments.quick)
    signal.signal(signal.SIGINT, bench.stop)
    signal.signal(signal.SIGTERM, bench.stop)
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        bench.run(families, Path(folder))
    bars = bench.outcome.judged()
    print_bars(bars)
    is_real = set(families) == set(suite.families) and not arguments.quick
    results = arguments.results or (RESULTS if is_real else None)
    if results is not None:
        write(suite.name, bench.outcome, bars, results)
        print(f"bench-{suite.name}: wrote {results / suite.name}.json")
    return exit_code(bars)
