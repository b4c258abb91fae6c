"""`python -m load_tests`: load a router with a scenario, compare two runs, search the highest rate that holds.

Exit code 0: everything held; 1: a threshold, an SLO or the tolerance of a comparison was broken; 2: it could not be
run. What is written under --out: report.json, report.txt, report.html.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load_tests.generator.comparison import compare, comparison_table
from load_tests.generator.crew import CrewError
from load_tests.generator.fields import ScenarioError
from load_tests.generator.page import html_page
from load_tests.generator.progress import ProgressView
from load_tests.generator.report import FILE, Report
from load_tests.generator.run import run_scenario
from load_tests.generator.scenario import parse_scenario, read_scenario
from load_tests.generator.search import search_max_rate
from load_tests.generator.target import check_target
from load_tests.generator.text_table import shown, text_table
from load_tests.generator.threshold import Threshold

CHANGES = {
    "seed": ("seed", int, "of arrivals and contents; the same seed sends the same requests at the same offsets"),
    "rate": ("arrivals.rate", float, "requests a second"),
    "concurrency": ("arrivals.concurrency", int, "users of a closed loop"),
    "duration": ("arrivals.duration_s", float, "seconds in which requests arrive"),
    "processes": ("processes", int, "that share the load"),
    "max-requests": ("limits.requests", int, "never more than these"),
    "call": ("call.kind", str, "session or generate"),
    "model": ("call.model", str, "which model to ask"),
}
"""Options that change a key of the scenario."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say, by default the command line's; return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        if arguments.command == "compare":
            return _compare(arguments)
        check_target(arguments.target, allows_remote=arguments.allow_remote)
        table, folder = read_scenario(arguments.scenario, _changes(arguments))
        if arguments.search_max_rate:
            return asyncio.run(_search(arguments, table, folder))
        report = asyncio.run(_run(table, folder, arguments.target))
        _write(report, arguments.out)
        print(text_table(report), end="")
        return 0 if report.holds and report.is_whole else 1
    except (ScenarioError, CrewError) as error:
        print(f"load_tests: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("load_tests: stopped before it began", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m load_tests", description=__doc__.split("\n")[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="load a router with a scenario")
    run.add_argument("scenario", help="a name in load_tests/scenarios, or a TOML file")
    run.add_argument("--target", required=True, help="HOST:PORT of a router")
    run.add_argument("--out", type=Path, help="directory for report.json, report.txt, report.html")
    run.add_argument("--allow-remote", action="store_true", help="the target may be on another machine; it is yours")
    for option, (key, kind, what) in CHANGES.items():
        run.add_argument(f"--{option}", type=kind, help=f"{what} ({key})")
    run.add_argument("--search-max-rate", action="store_true", help="find the highest rate at which all --slo hold")
    run.add_argument(
        "--slo", action="append", default=[], help="for instance 'first_token_s.p99 <= 0.5'; may be given several times"
    )
    run.add_argument("--precision", type=float, default=0.05, help="of the rate that is searched")
    comparing = commands.add_parser("compare", help="compare two runs")
    comparing.add_argument("first", type=Path, help="directory or report.json")
    comparing.add_argument("second", type=Path)
    comparing.add_argument(
        "--tolerance", type=float, default=0.1, help="by which part a figure may be worse before the exit code is 1"
    )
    return parser


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    given = {key: getattr(arguments, option.replace("-", "_")) for option, (key, _, _) in CHANGES.items()}
    return {key: value for key, value in given.items() if value is not None}


async def _run(table: dict[str, Any], folder: Path, target: str) -> Report:
    scenario = parse_scenario(table, folder)
    with ProgressView(scenario.name, scenario.arrivals.duration_s) as view:
        return await run_scenario(table, folder, target, show=view.show)


async def _search(arguments: argparse.Namespace, table: dict[str, Any], folder: Path) -> int:
    if not arguments.slo:
        raise ScenarioError("--search-max-rate needs at least one --slo")
    thresholds = [Threshold.parse(text) for text in arguments.slo]
    arrivals = parse_scenario(table, folder).arrivals
    arrivals.with_rate(arrivals.rate)
    best: list[Report] = []

    async def trial(rate: float) -> bool:
        changed = arrivals.with_rate(rate)
        tried = {
            **table,
            "arrivals": {**table["arrivals"], "rate": changed.rate, "from_rate": changed.from_rate},
            "thresholds": list(arguments.slo),
        }
        report = await _run(tried, folder, arguments.target)
        if not report.is_whole:
            raise CrewError("the search was stopped")
        facts = ", ".join(f"{each.figure} {shown(each.figure, report.figures[each.figure])}" for each in thresholds)
        print(f"{rate:.4g} a second: {'holds' if report.holds else 'broken'} ({facts})", flush=True)
        if report.holds:
            best[:] = [report]
        return report.holds

    found = await search_max_rate(trial, start=arrivals.rate, precision=arguments.precision)
    if found.holds is None:
        print(f"no rate was found at which {' and '.join(map(str, thresholds))}")
        return 1
    _write(best[0], arguments.out)
    print(f"highest rate that holds: {found.holds:.4g} a second")
    return 0


def _write(report: Report, out: Path | None) -> None:
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    (out / "report.txt").write_text(text_table(report), encoding="utf-8")
    (out / "report.html").write_text(html_page(report), encoding="utf-8")


def _compare(arguments: argparse.Namespace) -> int:
    first, second = Report.read(arguments.first), Report.read(arguments.second)
    changes = compare(first, second)
    print(comparison_table(first, second, changes, tolerance=arguments.tolerance), end="")
    return 1 if any(change.worsening() > arguments.tolerance for change in changes) else 0


if __name__ == "__main__":
    sys.exit(main())
