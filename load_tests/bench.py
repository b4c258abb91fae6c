"""`make bench`: Octavo's side of the benchmark. One replica, driven over gRPC through its router with four workloads.

Writes results/octavo.json and results/octavo.svg; measures, and judges nothing. The workloads are those of
`load_tests/workloads.py`; `make bench-peers` is what compares.

Arguments (ARGS="..."): --only single,conc16; --set dtype=fp32 (any key of [engine]); --model; --seed; --out.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.client import Client

from load_tests import machine
from load_tests.chart import draw
from load_tests.measurement import AskError, Measurement, measure
from load_tests.natural_text import NaturalText
from load_tests.octavo_driver import OctavoDriver
from load_tests.server import ServerError, end_on_sigterm, watched
from load_tests.workloads import WORKLOADS, Workload, make_prompts, warm_up_prompts

RESULTS = Path(__file__).parent / "results"
START_TIMEOUT_S = 900.0


async def drive(address: str, workloads: Sequence[Workload], seed: int) -> list[Measurement]:
    """Send every workload once. Raises AskError."""
    measurements = []
    async with Client(address) as client:
        text = await NaturalText.ask(client.tokenize)
    async with OctavoDriver(address) as driver:
        for prompt in warm_up_prompts(seed=seed, repetition=0):
            await driver.ask(prompt, 8)
        for workload in workloads:
            prompts = make_prompts(workload, text, seed=seed, repetition=0)
            measurement, _ = await measure(driver, workload, prompts)
            print(json.dumps(dataclasses.asdict(measurement)), flush=True)
            measurements.append(measurement)
    return measurements


def run(
    command: Sequence[str], variables: Mapping[str, str], workloads: Sequence[Workload], seed: int
) -> dict[str, Any]:
    """Start a cluster, drive it, stop it; return the report. Raises ServerError and AskError."""
    load = machine.load_average()
    with tempfile.TemporaryDirectory() as directory, watched(command, variables, Path(directory) / "log") as started:
        server, watch = started
        ready = json.loads(server.await_line("{", START_TIMEOUT_S))
        ready_s = time.perf_counter() - server.begun
        watch.calm_down()
        measurements = asyncio.run(drive(ready["address"], workloads, seed))
        watch.sample()
        return {
            "date": time.strftime("%Y-%m-%d %H:%M"),
            "machine": machine.describe(),
            "load_before": load,
            "engine": dict(variables),
            "seed": seed,
            "version": ready["version"],
            "ready_s": round(ready_s, 2),
            "peak_cluster_bytes": watch.peak_tree,
            "peak_replica_bytes": watch.peak_of([int(replica["pid"]) for replica in ready["replicas"]]),
            "workloads": [dataclasses.asdict(each) for each in measurements],
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(w.name for w in WORKLOADS), help="workloads, comma separated")
    parser.add_argument("--model", default="default", help="as for octavo serve")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of [engine]")
    parser.add_argument("--smoke", action="store_true", help="a few tokens each: shows that it works, measures nothing")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the prompts; default: a new one")
    parser.add_argument("--out", type=Path, default=RESULTS / "octavo.json", help="the picture goes beside it")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    workloads = [workload for workload in WORKLOADS if workload.name in names]
    if len(workloads) != len(names):
        parser.error(f"--only must be of {', '.join(w.name for w in WORKLOADS)}; is {arguments.only!r}")
    if arguments.smoke:
        workloads = [workload.shortened() for workload in workloads]
    settings = {"threads": "2", **dict(pair.split("=", 1) for pair in arguments.set)}
    variables = {f"OCTAVO_ENGINE__{key.upper()}": value for key, value in settings.items()}
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "serve",
        "--port",
        "0",
        "--replicas",
        "1",
        "--model",
        arguments.model,
    ]
    end_on_sigterm()
    try:
        report = run(command, variables, workloads, arguments.seed)
    except (ServerError, AskError) as error:
        raise SystemExit(f"bench: {error}") from None
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    title = f"octavo {report['version']}, {report['machine']['processor']}, {report['date']}"
    measurements = [Measurement(**each) for each in report["workloads"]]
    picture = arguments.out.with_suffix(".svg")
    picture.write_text(draw(measurements, title))
    print(f"bench: wrote {arguments.out} and {picture}")


if __name__ == "__main__":
    main()
