"""What the command line of every router bar does: measure, judge what there is, print it, write it.

    python -m load_tests.rigs.X [--repetitions N] [--quick] [--out FILE]

Exit code 0: every bar is met; 1: one is not, or could not be measured. Ctrl-C and SIGTERM end the measuring early; what
was measured by then is judged, the rest misses its bars. FILE gets {"rig", "machine", "load_before", "wall_s",
"is_whole", "runs", "bars"}; that each request had one terminal is judged by whoever reads the runs of all rigs.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import signal
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from load_tests import machine
from load_tests.bars import Bar, exit_code
from load_tests.notes import Notes, judge_terminals
from load_tests.peers.tables import print_bars

Measure = Callable[["Settings", Notes], Awaitable[None]]
Judge = Callable[[Notes], list[Bar]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How much is measured. `is_quick`: a second of each, which shows that it works and measures little."""

    repetitions: int = 3
    is_quick: bool = False

    def seconds(self, whole: float, quick: float = 1.0) -> float:
        return quick if self.is_quick else whole

    def rounds(self, limit: int = 1_000) -> range:
        """Return the numbers of the repetitions, at most `limit`."""
        return range(1 if self.is_quick else min(self.repetitions, limit))


class StoppedError(Exception):
    """Whoever started this wants it to end."""


def main(name: str, measure: Measure, judge: Judge, argv: Sequence[str] | None = None) -> int:
    """Run one rig's command line; return its exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m load_tests.rigs.{name}")
    parser.add_argument("--repetitions", type=int, default=3, help="of what is compared, alternately")
    parser.add_argument("--quick", action="store_true", help="a second of each: shows that it works, measures little")
    parser.add_argument("--out", type=Path, help="a JSON file for runs and bars")
    arguments = parser.parse_args(argv)
    if arguments.repetitions < 1:
        parser.error(f"--repetitions must be >= 1, is {arguments.repetitions}")
    settings = Settings(repetitions=arguments.repetitions, is_quick=arguments.quick)
    load, began, notes = machine.load_average(), time.monotonic(), Notes()
    is_whole = run_measure(measure, settings, notes)
    bars = judge(notes)
    shown = [*bars, judge_terminals(notes.runs)] if any("sent" in run for run in notes.runs) else bars
    print_bars(shown)
    if arguments.out is not None:
        report = {
            "rig": name,
            "machine": machine.describe(),
            "load_before": load,
            "wall_s": round(time.monotonic() - began, 1),
            "is_whole": is_whole,
            "runs": notes.runs,
            "bars": [dataclasses.asdict(bar) for bar in bars],
        }
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    return exit_code(shown)


def run_measure(measure: Measure, settings: Settings, notes: Notes) -> bool:
    """Fill `notes`; return whether that came to its end. What breaks is said, and costs what was not yet measured."""

    def end(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGTERM, end)
    try:
        asyncio.run(measure(settings, notes))
    except (KeyboardInterrupt, StoppedError):
        print("stopped: what follows is what there was", file=sys.stderr, flush=True)
        return False
    except Exception:
        traceback.print_exc()
        return False
    finally:
        signal.signal(signal.SIGTERM, before)
    return True
