"""What a bench is asked to do: its command line."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from load_tests import machine
from load_tests.peers.contestants import Contestant, all_contestants, defaults
from load_tests.peers.earlier import Earlier, EarlierError, read_earlier
from load_tests.workloads import WORKLOADS, Workload

RESULTS = Path(__file__).parents[1] / "results"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the command line asks for."""

    folder: Path
    contestants: Sequence[Contestant]
    workloads: Sequence[Workload]
    repetitions: int
    seed: int
    is_smoke: bool
    earlier: Earlier
    """What was measured before and counts, too."""


def parse(arguments: Sequence[str] | None = None) -> Plan:
    parser = argparse.ArgumentParser(
        prog="make bench-peers",
        description="Octavo and its peers on the same machine in the same minutes, held to the bars",
    )
    parser.add_argument("folder", type=Path, help="where the peers are (see load_tests/peers/README.md)")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--contestants", default="", help="comma separated; default: all that this machine is made for")
    parser.add_argument("--workloads", default="", help="comma separated; default: all")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the prompts; default: a new one")
    parser.add_argument("--smoke", action="store_true", help="a few tokens each: shows that it works, measures nothing")
    parser.add_argument("--add", action="store_true", help="keep what results/peers_runs.json has of other contestants")
    given = parser.parse_args(arguments)
    contestants = _chosen(parser, "contestants", given.contestants, all_contestants(), defaults(machine.instructions()))
    workloads = _chosen(parser, "workloads", given.workloads, WORKLOADS, WORKLOADS)
    if given.repetitions < 1:
        parser.error(f"--repetitions must be >= 1, is {given.repetitions}")
    if given.add and given.smoke:
        parser.error("--add counts what a smoke run does not measure")
    try:
        earlier = read_earlier(RESULTS / "peers_runs.json", machine.describe()) if given.add else Earlier()
    except EarlierError as error:
        parser.error(f"--add: {error}")
    return Plan(
        folder=given.folder.absolute(),
        contestants=contestants,
        workloads=[workload.shortened() for workload in workloads] if given.smoke else workloads,
        repetitions=given.repetitions,
        seed=given.seed,
        is_smoke=given.smoke,
        earlier=earlier.without([contestant.name for contestant in contestants]),
    )


def _chosen(
    parser: argparse.ArgumentParser, what: str, names: str, every: Sequence[Any], default: Sequence[Any]
) -> Any:
    if not names:
        return default
    by_name = {each.name: each for each in every}
    unknown = [name for name in names.split(",") if name not in by_name]
    if unknown:
        parser.error(f"--{what} must be of {', '.join(by_name)}; {unknown[0]!r} is not")
    return [by_name[name] for name in names.split(",")]
