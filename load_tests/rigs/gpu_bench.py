"""Our engine beside vLLM on one GPU: both in memory, asked by turns, compared with each other and with the floor.

    python -m load_tests.rigs.gpu_bench --out FILE [--models A,B] [--rounds 2] [--engines octavo,vllm]
        [--checks] [--weights GGUF] [--cluster] [--vllm-path DIR] [--octavo-path DIR]

Each engine has a process of its own (`gpu_contestant`), with DIR in front of what Python finds. After each model FILE
(NAME.json) has the bars, NAME_runs.json every figure, and NAME.txt a table of them: for every case what each engine
reached, how far that is from vLLM and from the floor (`gpu_cases`). Exit code 0: every bar that was measured is met.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load_tests import machine
from load_tests.bars import Bar, at_least, at_most, write_bars
from load_tests.rigs import gpu_cases

ROOT = Path(__file__).parents[2]
STOP_S = 20.0


class ContestantError(Exception):
    """A process said that it cannot, or said nothing."""


class Contestant:
    """An engine in a process of its own; ready when `facts` are there."""

    def __init__(self, engine: str, model: str, folder: str, path: str) -> None:
        self.engine = engine
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (path, str(ROOT), str(ROOT / "protos"))))
        }
        command = [sys.executable, "-m", "load_tests.rigs.gpu_contestant", engine, model, folder]
        began = time.monotonic()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )
        self.facts = self._hear()
        self.facts["process_to_ready_s"] = time.monotonic() - began
        self._hear()
        self.facts["process_to_warm_s"] = time.monotonic() - began

    def measure(self, case: str, seed: int) -> float:
        """Raises ContestantError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{case} {seed}\n")
            self._process.stdin.flush()
        except OSError as error:
            raise ContestantError(f"{self.engine} has ended") from error
        return float(self._hear()["value"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ContestantError(f"{self.engine} has ended with {self._process.wait()}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise ContestantError(f"{self.engine}: {message['error']}")
        return message


@dataclasses.dataclass
class Report:
    """What was measured; `runs` has a row for each figure."""

    machine: dict[str, object]
    engines: dict[str, Any] = dataclasses.field(default_factory=dict)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    checks: Any = None
    cluster: Any = None

    def best(self, model: str, case: gpu_cases.Case, engine: str) -> float | None:
        values = [r["value"] for r in self.runs if (r["model"], r["case"], r["engine"]) == (model, case.name, engine)]
        return (max if case.is_rate else min)(values, default=None)

    def start_s(self, model: str, engine: str) -> float | None:
        facts = self.engines.get(f"{engine} {model}")
        return None if facts is None else float(facts["start_s"])


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    report = Report(machine.describe() | {"gpu": _gpu_name()})
    for model in arguments.models.split(","):
        try:
            measure_model(report, model, arguments)
        except ContestantError as error:
            report.errors.append(f"{model}: {error}")
            print(f"{model}: {error}", flush=True)
        write(report, arguments.out)
    if arguments.checks:
        weights = ["--weights", str(arguments.weights)] if arguments.weights else []
        report.checks = _other_rig("gpu_checks", arguments, weights)
        write(report, arguments.out)
    if arguments.cluster:
        report.cluster = _other_rig("gpu_cluster", arguments)
    bars = write(report, arguments.out)
    return 0 if all(bar.ok for bar in bars) and not report.errors else 1


def measure_model(report: Report, model: str, arguments: argparse.Namespace) -> None:
    """Start both engines one after the other, then ask them by turns."""
    paths = {"vllm": arguments.vllm_path, "octavo": arguments.octavo_path}
    contestants: list[Contestant] = []
    with tempfile.TemporaryDirectory() as folder, _closing(contestants):
        # vLLM first: it measures what is free while it starts.
        for engine in sorted(arguments.engines.split(","), reverse=True):
            try:
                contestants.append(Contestant(engine, model, folder, paths[engine]))
            except ContestantError as error:
                report.errors.append(f"{model}: {error}")
                print(f"{model}: {error}", flush=True)
                continue
            facts = report.engines[f"{engine} {model}"] = contestants[-1].facts
            print(f"{engine} {model}: {json.dumps(facts)}", flush=True)
        for number in range(arguments.rounds):
            for case in gpu_cases.CASES:
                for contestant in contestants if number % 2 else contestants[::-1]:
                    _measure_case(report, model, case, contestant, number)
            write(report, arguments.out, shows=False)
    print(table(report, [model]), flush=True)


def _measure_case(report: Report, model: str, case: gpu_cases.Case, contestant: Contestant, number: int) -> None:
    seed = 1_000 * number + 10 * gpu_cases.CASES.index(case) + 1
    try:
        value = contestant.measure(case.name, seed)
    except ContestantError as error:
        report.errors.append(f"{model}, {case.name}: {error}")
        return
    row = {"model": model, "case": case.name, "engine": contestant.engine, "round": number, "value": value}
    report.runs.append(row | {"unit": case.unit})


def bars_of(report: Report) -> list[Bar]:
    """Return a bar for each case that both engines were asked."""
    bars = []
    for model in gpu_cases.CONFIGS:
        for case in gpu_cases.CASES:
            ours, theirs = report.best(model, case, "octavo"), report.best(model, case, "vllm")
            if ours is None or theirs is None:
                continue
            limit = case.limits[model][0]
            judge = at_least if case.is_rate else at_most
            floor = case.floor(gpu_cases.Size.of(gpu_cases.CONFIGS[model]))
            detail = f"{ours:.4g} {case.unit}, vLLM {theirs:.4g}, floor {floor:.4g}"
            bars.append(judge(f"{model}: {case.name}, ratio to vLLM", ours / theirs, limit, detail))
        ours, theirs = report.start_s(model, "octavo"), report.start_s(model, "vllm")
        if ours is not None and theirs is not None:
            detail = f"{ours:.1f} s, vLLM {theirs:.1f} s, imports apart"
            bars.append(at_most(f"{model}: start, ratio to vLLM", ours / theirs, gpu_cases.START_LIMITS[model], detail))
    return bars


def table(report: Report, models: Sequence[str]) -> str:
    """Return the figures as lines: a case each, with both ratios and the bar."""
    lines = [f"{'':38}{'ours':>10}{'vLLM':>10}{'floor':>10}{'/ vLLM':>9}{'bar':>7}{'/ floor':>9}{'spread':>8}"]
    for model in models:
        size = gpu_cases.Size.of(gpu_cases.CONFIGS[model])
        for case in gpu_cases.CASES:
            ours, theirs = report.best(model, case, "octavo"), report.best(model, case, "vllm")
            floor = case.floor(size)
            ratio = ours / theirs if ours and theirs else None
            away = None if not ours else floor / ours if case.is_rate else ours / floor
            cells = (_number(ours, 10), _number(theirs, 10), _number(floor, 10), _number(ratio, 9))
            rest = f"{case.limits[model][0]:>7}{_number(away, 9)}{_number(_spread(report, model, case), 8)}"
            lines.append(f"{model + ' ' + case.name:38}{''.join(cells)}{rest}")
        ours, theirs = report.start_s(model, "octavo"), report.start_s(model, "vllm")
        ratio = ours / theirs if ours and theirs else None
        cells = (_number(ours, 10), _number(theirs, 10), _number(None, 10), _number(ratio, 9))
        lines.append(f"{model + ' start, s':38}{''.join(cells)}{gpu_cases.START_LIMITS[model]:>7}")
    return "\n".join(lines)


def _number(value: float | None, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.3f}" if value < 1000 else f"{value:>{width}.0f}"


def _spread(report: Report, model: str, case: gpu_cases.Case) -> float | None:
    """Return by how much our rounds differ, as a part of their mean."""
    ours = [r["value"] for r in report.runs if (r["model"], r["case"], r["engine"]) == (model, case.name, "octavo")]
    return (max(ours) - min(ours)) / statistics.mean(ours) if len(ours) > 1 else None


def write(report: Report, path: Path, *, shows: bool = True) -> list[Bar]:
    """Write what there is by now; return the bars."""
    bars = bars_of(report)
    for extra in (report.checks, report.cluster):
        if isinstance(extra, dict):
            bars += [Bar(**bar) for bar in extra.get("bars", ())]
    write_bars(bars, path)
    path.with_name(f"{path.stem}_runs.json").write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    path.with_suffix(".txt").write_text(
        table(report, [m for m in gpu_cases.CONFIGS if f"octavo {m}" in report.engines]) + "\n"
    )
    if shows:
        for bar in bars:
            print(f"{'ok  ' if bar.ok else 'MISS'} {bar.bar}: {bar.value} (bar {bar.limit}); {bar.detail}", flush=True)
    return bars


def _other_rig(name: str, arguments: argparse.Namespace, more: Sequence[str] = ()) -> Any:
    """Run another rig of this folder in a process of its own; return what it wrote, or why it did not."""
    out = arguments.out.with_name(f"{name}.json")
    path = os.pathsep.join(filter(None, (arguments.octavo_path, str(ROOT), str(ROOT / "protos"))))
    command = [sys.executable, "-m", f"load_tests.rigs.{name}", "--out", str(out), *more]
    status = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    try:
        return json.loads(out.read_text())
    except (OSError, ValueError):
        return {"error": f"{name} ended with {status}", "bars": []}


@contextmanager
def _closing(contestants: list[Contestant]) -> Iterator[None]:
    try:
        yield
    finally:
        for contestant in contestants:
            contestant.close()


def _gpu_name() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.gpu_bench", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--models", default=",".join(gpu_cases.CONFIGS))
    parser.add_argument("--engines", default="octavo,vllm")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checks", action="store_true", help="see that the engine computes what it should, too")
    parser.add_argument("--weights", type=Path, help="for the checks: the GGUF file of the oracle")
    parser.add_argument("--cluster", action="store_true", help="measure through the whole cluster, too")
    parser.add_argument("--vllm-path", default="", help="where vLLM is installed, if not with this Python")
    parser.add_argument("--octavo-path", default="", help="where our optional dependencies are, likewise")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
