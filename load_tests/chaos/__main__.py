"""`make chaos`: a cluster under load, a fault every 20 s, every answer looked at. Exit code 1 if a bar is not met.

Two families, one after the other: three replicas of the fake engine on three nodes, and two of the real model in fp32
with one thread each; two routers in front of both. Faults follow from --seed. Writes chaos.json (the bars), chaos.txt
(the same as a table) and chaos_runs.json (every fault with its victim, recovery, longest pause and errors) to results/.
--quick, which is three faults of the fake engine, and single families write nothing unless --results says where. Ctrl-C
and SIGTERM end it early: what there was is judged, the rest misses.

Arguments (ARGS="..."): --minutes, --seed, --families fake,model, --kinds, --quick, --logs DIR, --results DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from load_tests import machine
from load_tests.bars import exit_code
from load_tests.chaos.families import FAMILIES, Family
from load_tests.chaos.plan import Fault, plan
from load_tests.chaos.report import judge
from load_tests.chaos.run import Course, run
from load_tests.chaos.strikes import NODE_LOST, STRIKES
from load_tests.notes import Notes
from load_tests.peers.tables import print_bars
from load_tests.rig_bench import RESULTS, Outcome, write
from load_tests.rigs.bar_command import Settings, run_measure

EVERY_S, LENGTHS_S = 20.0, (2.0, 12.0)
QUICK_S, QUICK_EVERY_S, QUICK_LENGTHS_S = 18.0, 6.0, (1.0, 2.0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parse(argv)
    families: dict[str, Family] = {name: _family(name, arguments) for name in arguments.families}
    plans = {name: _plan(family, arguments) for name, family in families.items()}
    outcome, notes, load = Outcome(), Notes(), machine.load_average()
    for name, family in families.items():
        if outcome.is_whole:
            print(f"chaos: {name}, {len(plans[name])} faults, seed {arguments.seed}", flush=True)
            outcome.is_whole = _measure(name, family, plans[name], arguments, notes)
    outcome.runs = notes.runs
    outcome.bars = judge(notes, list(families), {name: [each.kind for each in plans[name]] for name in families})
    outcome.reports = [
        {"rig": "chaos", "seed": arguments.seed, "minutes": arguments.minutes, "load_before": load},
        *({"rig": name, "variables": dict(family.variables)} for name, family in families.items()),
    ]
    bars = outcome.judged()
    print_bars(bars)
    is_real = set(families) == set(FAMILIES) and not (arguments.quick or arguments.kinds)
    results = arguments.results or (RESULTS if is_real else None)
    if results is not None:
        write("chaos", outcome, bars, results)
        print(f"chaos: wrote {results / 'chaos.json'}")
    return exit_code(bars)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of load, for each family")
    parser.add_argument("--seed", type=int, default=7, help="what faults strike, and whom")
    parser.add_argument("--families", help=f"of {','.join(FAMILIES)}; default: all, with --quick fake")
    parser.add_argument("--kinds", help="of faults, separated by semicolons; default: all")
    parser.add_argument("--quick", action="store_true", help="three faults: shows that it works")
    parser.add_argument("--logs", type=Path, help="a directory for what the clusters wrote; default: not kept")
    parser.add_argument("--results", type=Path, help="a directory; default: results/ for a whole run, else none")
    arguments = parser.parse_args(argv)
    arguments.families = (arguments.families or ("fake" if arguments.quick else ",".join(FAMILIES))).split(",")
    arguments.kinds = arguments.kinds.split(";") if arguments.kinds else []
    for option, given, known in (
        ("--families", arguments.families, FAMILIES),
        ("--kinds", arguments.kinds, STRIKES),
    ):
        if unknown := [each for each in given if each not in known]:
            parser.error(f"{option} must be of {', '.join(known)}; {unknown[0]!r} is not")
    if arguments.minutes * 60 < EVERY_S:
        parser.error(f"--minutes must be >= {EVERY_S / 60:.2g}, is {arguments.minutes:g}")
    return arguments


def _family(name: str, arguments: argparse.Namespace) -> Family:
    family = FAMILIES[name]
    if arguments.quick:  # starting nodes takes longer than that
        family = dataclasses.replace(family, nodes=0, kinds=tuple(kind for kind in family.kinds if kind != NODE_LOST))
    return dataclasses.replace(family, kinds=arguments.kinds or family.kinds)


def _plan(family: Family, arguments: argparse.Namespace) -> list[Fault]:
    if arguments.quick:
        return plan(
            family.kinds, seed=arguments.seed, duration_s=QUICK_S, every_s=QUICK_EVERY_S, lengths_s=QUICK_LENGTHS_S
        )
    return plan(
        family.kinds, seed=arguments.seed, duration_s=60 * arguments.minutes, every_s=EVERY_S, lengths_s=LENGTHS_S
    )


def _measure(name: str, family: Family, faults: Sequence[Fault], arguments: argparse.Namespace, notes: Notes) -> bool:
    """Run one family and note what happened; return whether it came to its end."""
    course = Course()
    logs = None if arguments.logs is None else arguments.logs / name
    duration_s = QUICK_S if arguments.quick else 60 * arguments.minutes

    async def measure(_settings: Settings, _notes: Notes) -> None:
        await run(family, faults, course, duration_s=duration_s, is_quick=arguments.quick, logs=logs)

    is_whole = run_measure(measure, Settings(is_quick=arguments.quick), notes)
    course.note(name, notes)
    return is_whole


if __name__ == "__main__":
    sys.exit(main())
