"""`make bench-peers P=DIR`: Octavo and its peers on the same machine in the same minutes, held to the bars.

One server at a time, ours and the peers' in turns, and that several times over; within a repetition all get the same
prompts, in the next one new ones. Then the oracle judges a sample of our answers, perplexity and start-up are measured.
Writes results/peers.json (a row for each bar) and results/peers_runs.json (every figure); prints both as tables.

Ctrl-C ends the rounds early; what was measured until then is judged all the same. `--add` judges what is measured now
together with results/peers_runs.json, in which it takes the place of the same contestants' runs.

Exit codes: 0 every bar is met; 1 one is not; 2 wrong usage.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from load_tests import machine
from load_tests.bars import exit_code, write_bars
from load_tests.measurement import AskError, Measurement, Sample, measure
from load_tests.natural_text import NaturalText
from load_tests.peers.comparison import OURS, Findings, compare
from load_tests.peers.contestants import (
    MODEL_FILE,
    THREADS,
    TOKENIZER,
    Contestant,
    Octavo,
    Ready,
)
from load_tests.peers.plan import RESULTS, Plan, parse
from load_tests.peers.runs import Run, by_contestant
from load_tests.peers.tables import print_bars, print_figures
from load_tests.processor_time import ProcessorTime
from load_tests.server import ServerError, ServerProcess, end_on_sigterm, free_port, watched
from load_tests.workloads import WORKLOADS, make_prompts, warm_up_prompts

QUIET_CORES = 0.25
QUIET_TIMEOUT_S = 60.0
JUDGED = {"single": 4, "conc16": 4, "prefix": 2, "longin": 2}
"""How many answers of each workload the oracle judges, of one repetition."""
JUDGED_TOKENS = 32


Case = dict[str, Any]
"""An answer for the oracle: "arithmetic", "prompt", "answer"."""


class Bench:
    """Runs a plan, and keeps what comes of it."""

    def __init__(self, plan: Plan, text: NaturalText, cache: Path) -> None:
        self._plan = plan
        self._text = text
        self._cache = cache
        self.runs: list[Run] = []
        self.cases: dict[str, list[Case]] = {}

    def run(self) -> None:
        """Run the plan, or what there is time for until Ctrl-C."""
        try:
            for repetition in range(self._plan.repetitions):
                for contestant in self._plan.contestants:
                    self._take_turn(contestant, repetition)
        except KeyboardInterrupt:
            _say(f"stopped early: {len(self.runs)} runs count")

    def _take_turn(self, contestant: Contestant, repetition: int) -> None:
        load, busy = machine.load_average(), machine.await_quiet(QUIET_CORES, self._quiet_timeout_s)
        _say(f"repetition {repetition + 1}, {contestant.name}: load {load}, {busy} cores busy with other things")
        run = self._one(contestant, repetition, load, busy)
        self.runs.append(run)
        _say(f"  {run.failure}" if run.failure else f"  ready in {run.ready_s:.1f} s; {_brief(run)}")

    @property
    def _quiet_timeout_s(self) -> float:
        return 0.0 if self._plan.is_smoke else QUIET_TIMEOUT_S

    def _one(self, contestant: Contestant, repetition: int, load: float, busy: float) -> Run:
        run = Run(
            contestant=contestant.name,
            family=contestant.family,
            repetition=repetition,
            began=time.strftime("%Y-%m-%d %H:%M"),
            load_before=load,
            busy_before=busy,
        )
        missing = contestant.missing(self._plan.folder)
        if missing:
            return dataclasses.replace(run, failure=f"not installed: {missing[0]} is missing")
        port = free_port()
        log = self._plan.folder / "logs" / f"{contestant.name}.{repetition}.log"
        log.parent.mkdir(exist_ok=True)
        variables = {**contestant.variables(self._plan.folder), **self._own_cache(contestant)}
        try:
            with watched(contestant.command(self._plan.folder, port), variables, log) as (server, watch):
                ready = contestant.await_ready(server, port)
                run = dataclasses.replace(run, ready_s=round(time.perf_counter() - server.begun, 2))
                watch.calm_down()
                run = asyncio.run(self._drive(contestant, ready, server, run))
                watch.sample()
                return dataclasses.replace(
                    run, peak_tree_bytes=watch.peak_tree, peak_replica_bytes=watch.peak_of(ready.replicas)
                )
        except (ServerError, AskError) as error:
            return dataclasses.replace(run, failure=str(error))

    def _own_cache(self, contestant: Contestant) -> Mapping[str, str]:
        """A cache of this bench alone, so that weights are packed in its first start and in no other."""
        return {"OCTAVO_CACHE_DIR": str(self._cache)} if isinstance(contestant, Octavo) else {}

    async def _drive(self, contestant: Contestant, ready: Ready, server: ServerProcess, run: Run) -> Run:
        seed, repetition = self._plan.seed, run.repetition
        async with contestant.driver(ready) as driver:
            prompts = warm_up_prompts(seed=seed, repetition=repetition)
            first = await driver.ask(prompts[0], 1)
            await driver.ask(prompts[1], 8)
            run = dataclasses.replace(run, first_answer_s=round(first.total_s, 3))
            for workload in self._plan.workloads:
                asked = make_prompts(workload, self._text, seed=seed, repetition=repetition)
                spent = ProcessorTime(server.pid, ready.replicas, engine_threads=THREADS)
                try:
                    measurement, samples = await measure(driver, workload, asked)
                except AskError as error:
                    return dataclasses.replace(run, failure=f"{workload.name}: {error}")
                run = dataclasses.replace(
                    run,
                    measurements=(*run.measurements, measurement),
                    cpu_s={**run.cpu_s, workload.name: spent.seconds()},
                )
                if isinstance(contestant, Octavo) and repetition == 0:
                    cases = _cases(contestant.arithmetic, asked, samples, JUDGED[workload.name])
                    self.cases.setdefault(contestant.name, []).extend(cases)
        return run


def _cases(arithmetic: str, prompts: list[list[int]], samples: Sequence[Sample], count: int) -> Iterator[Case]:
    for prompt, sample in list(zip(prompts, samples, strict=True))[:count]:
        yield {"arithmetic": arithmetic, "prompt": prompt, "answer": list(sample.token_ids[:JUDGED_TOKENS])}


def output_of(name: str, *arguments: str, given: str | None = None) -> Any:
    """Run a program of load_tests in a process of its own; return the JSON that it wrote, or None if it failed."""
    command = [sys.executable, "-m", f"load_tests.{name}", *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        try:
            said, _ = program.communicate(given)
        except BaseException:
            program.terminate()  # not killed, as subprocess.run would: it may have a server to end
            raise
    if program.returncode != 0:
        _say(f"  {name} failed with code {program.returncode}")
        return None
    return json.loads(said)


def find_out(plan: Plan, bench: Bench) -> Findings:
    """Measure what needs no server, and put everything together."""
    weights = plan.folder / MODEL_FILE
    earlier = plan.earlier
    verdicts: dict[str, Any] = {**earlier.verdicts}
    for name, cases in bench.cases.items():
        _say(f"the oracle judges {len(cases)} answers of {name}")
        verdicts[name] = output_of("rigs.judge", "--weights", str(weights), given=json.dumps(cases)) or []
    perplexity: dict[str, float] = {**earlier.perplexity_increase}
    starts: dict[str, Any] = {**earlier.starts}
    ours = {contestant.name for contestant in plan.contestants}
    for column, contestant in OURS.items():
        if contestant.name in ours:
            _say(f"perplexity of {contestant.name}")
            size = ("--windows", "1", "--window-tokens", "64") if plan.is_smoke else ()
            options = [part for key, value in contestant.settings.items() for part in (f"--{key.lower()}", value)]
            report = output_of("rigs.perplexity", "--model", str(weights), *options, *size)
            if report is not None:
                perplexity[column] = report["increase"]
    if OURS["int8"].name in ours:
        _say("starts of a replica")
        starts = both_starts(
            output_of("startup", "--model", str(weights)), output_of("rigs.replica_start", "--model", str(weights))
        )
    return Findings(
        medians=by_contestant([*earlier.runs, *bench.runs]),
        verdicts=verdicts,
        perplexity_increase=perplexity,
        starts=starts,
    )


def both_starts(served: Any, bare: Any) -> dict[str, Any]:
    """Return the times of replicas that Serve started, with what `replica_start` says of their imports beside them."""
    return {
        which: {**(served or {}).get(which, {}), "imported": bare[which]["imported"] if bare else None}
        for which in ("first", "later")
    }


def report(plan: Plan, bench: Bench, findings: Findings) -> dict[str, Any]:
    runs = [*plan.earlier.runs, *bench.runs]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": machine.describe(),
        "seed": plan.seed,
        "repetitions": max((run.repetition + 1 for run in runs), default=0),
        "is_smoke": plan.is_smoke,
        "runs": [dataclasses.asdict(run) for run in runs],
        "verdicts": findings.verdicts,
        "perplexity_increase": findings.perplexity_increase,
        "starts": findings.starts,
    }


def _brief(run: Run) -> str:
    return ", ".join(_figure(measurement) for measurement in run.measurements)


def _figure(measurement: Measurement) -> str:
    unit = next(workload.unit for workload in WORKLOADS if workload.name == measurement.workload)
    value = measurement.output_tokens_per_s if unit == "tokens" else measurement.requests_per_s
    return f"{measurement.workload} {value:.4g} {unit}/s"


def _say(text: str) -> None:
    print(f"bench-peers: {text}", flush=True)


def main() -> int:
    plan = parse()
    tokenizer = plan.folder / TOKENIZER
    if not tokenizer.exists():
        print(f"bench-peers: {tokenizer} is missing; load_tests/peers/README.md says how it is made", file=sys.stderr)
        return 2
    end_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as cache:
        bench = Bench(plan, NaturalText.read(tokenizer), Path(cache))
        bench.run()
        findings = find_out(plan, bench)
    bars = compare(findings)
    results = plan.folder / "smoke" if plan.is_smoke else RESULTS
    write_bars(bars, results / "peers.json")
    (results / "peers_runs.json").write_text(json.dumps(report(plan, bench, findings), indent=1) + "\n")
    print_figures(findings.medians)
    print_bars(bars)
    return exit_code(bars)


if __name__ == "__main__":
    sys.exit(main())
