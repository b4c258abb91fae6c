"""vLLM through Octavo against vLLM's own server: the same vLLM, weights, threads and settings on the same machine.

    octavo    client -- Session --> router -- data plane --> replica, in whose process vLLM's front end is
    served    client -- HTTP, a stream of events an answer --> `vllm serve`

Each repetition starts both, one after the other and the first one in turns, and sends them the workloads `single` and
`conc16` of load_tests/workloads.py, with the same prompts; it compares within itself, and the median of the repetitions
is judged. Whatever a server does when it computes for the first time has been done before, with prompts of its own.
Needs the environment of load_tests/engines/vllm_env.sh; four minutes a repetition.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster.models import fetch_model
from load_tests import machine, process_tree
from load_tests.bars import Bar, at_least, at_most
from load_tests.measurement import Driver, Measurement, measure
from load_tests.natural_text import NaturalText
from load_tests.notes import Notes, figure
from load_tests.peers.contestants import Contestant, Octavo, Vllm
from load_tests.rigs.bar_command import Settings, main
from load_tests.server import ServerProcess, free_port
from load_tests.vllm_place import vllm_environment
from load_tests.workloads import WORKLOADS, Workload, make_prompts, warm_up_prompts
from workers.vllm_engine.directory import directory_of

NAMES = ("conc16", "single")
WAYS = ("octavo", "served")
SEED = 9
WARM_UP = Workload(name="warm-up", requests=16, concurrency=16, own=128, output=16, unit="tokens")
MIN_SPEED, MAX_FIRST_TOKEN = 1.0, 1.05


def contestants(environment: Path) -> Mapping[str, Contestant]:
    """Return both, in the precision that is faster on this machine. Raises ModelFileError."""
    is_wide = "avx512f" in machine.instructions()
    files = fetch_model("default")
    directory = directory_of(files, "bf16" if is_wide else "fp32")
    served = Vllm(
        name="served",
        dtype="bfloat16" if is_wide else "float32",
        program=str(environment / "bin" / "vllm"),
        weights=str(directory),
    )
    settings = {
        "ENGINE": "vllm",
        "PYTHON": str(environment / "bin" / "python"),
        "DTYPE": "bf16" if is_wide else "fp32",
        "MAX_MODEL_LEN": "4096",
        "MAX_NUM_SEQUENCES": "16",
        "NUM_BLOCKS": "0",
    }
    extra = {**served.variables(environment), "VLLM_LOGGING_LEVEL": "WARNING"}
    return {
        "octavo": Octavo(name="octavo", arithmetic="exact", settings=settings, model="default", extra=extra),
        "served": served,
    }


async def measure_both(settings: Settings, notes: Notes) -> None:
    environment = vllm_environment()
    both = contestants(environment)
    text = NaturalText.read(fetch_model("default").tokenizer_json)
    workloads = [workload for workload in WORKLOADS if workload.name in NAMES]
    if settings.is_quick:
        workloads = [workload.shortened() for workload in workloads]
    for repetition in settings.rounds():
        for way in WAYS if repetition % 2 == 0 else WAYS[::-1]:
            with tempfile.TemporaryDirectory(prefix="octavo-engines-") as folder:
                await _one(both[way], environment, Path(folder) / "log", workloads, text, repetition, notes)


async def _one(
    contestant: Contestant,
    environment: Path,
    log: Path,
    workloads: list[Workload],
    text: NaturalText,
    repetition: int,
    notes: Notes,
) -> None:
    """Start one of them and note what it does. Raises ServerError and AskError."""
    port = free_port()
    server = ServerProcess(contestant.command(environment, port), contestant.variables(environment), log)
    try:
        ready = await asyncio.to_thread(contestant.await_ready, server, port)
        async with contestant.driver(ready) as driver:
            await _warm_up(driver, text, repetition)
            for workload in workloads:
                prompts = make_prompts(workload, text, seed=SEED, repetition=repetition)
                before = _cpu_s(server.pid)
                measured, samples = await measure(driver, workload, prompts)
                spent = {who: round(s - before[who], 2) for who, s in _cpu_s(server.pid).items()}
                _note(notes, contestant.name, measured, spent, len(samples))
    finally:
        server.stop()


def _cpu_s(server: int) -> dict[str, float]:
    """Return the processor seconds of vLLM's engine and of all else of the server, and of this one."""
    spent = {"engine": 0.0, "others": 0.0, "driver": time.process_time()}
    for process in process_tree.tree(server):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes()
            is_engine = command.startswith((b"VLLM::EngineCore", b"VLLM::Worker"))
            spent["engine" if is_engine else "others"] += process_tree.cpu_s(process.pid)
    return spent


async def _warm_up(driver: Driver, text: NaturalText, repetition: int) -> None:
    for prompt in warm_up_prompts(seed=SEED, repetition=repetition):
        await driver.ask(prompt, 8)
    await measure(driver, WARM_UP, make_prompts(WARM_UP, text, seed=SEED, repetition=repetition))


def _note(notes: Notes, name: str, measured: Measurement, cpu_s: Mapping[str, float], sent: int) -> None:
    notes.add(
        f"{name}, {measured.workload}",
        sent=sent,
        ended=measured.requests,
        tokens_per_s=measured.output_tokens_per_s,
        first_token_ms=measured.first_token_p50_ms,
        per_token_ms=measured.per_token_p50_ms,
        **{f"{who}_cpu_s": seconds for who, seconds in cpu_s.items()},
    )


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for name in NAMES:
        speed = at_least(f"vllm, {name}: tokens/s, x vllm serve", _compared(notes, name, "tokens_per_s"), MIN_SPEED)
        first = at_most(
            f"vllm, {name}: first token, x vllm serve", _compared(notes, name, "first_token_ms"), MAX_FIRST_TOKEN
        )
        bars += [_told(notes, name, "tokens_per_s", speed), _told(notes, name, "first_token_ms", first)]
    return bars


def _compared(notes: Notes, name: str, key: str) -> float | None:
    """Return the median over the repetitions of what Octavo's figure is to the other one."""
    pairs = zip(notes.of(f"octavo, {name}", key), notes.of(f"served, {name}", key), strict=False)
    compared = [ours / theirs for ours, theirs in pairs if theirs]
    return statistics.median(compared) if compared else None


def _told(notes: Notes, name: str, key: str, bar: Bar) -> Bar:
    ours, theirs = (notes.median(f"{way}, {name}", key) for way in WAYS)
    cpu: list[Any] = [notes.median(f"{way}, {name}", "others_cpu_s") for way in WAYS]
    detail = (
        f"{figure(ours)} beside {figure(theirs)}; CPU beside the engine's {figure(cpu[0])} beside {figure(cpu[1])} s"
    )
    return Bar(bar.bar, bar.value, bar.limit, bar.ok, detail)


if __name__ == "__main__":
    sys.exit(main("engines_vllm", measure_both, judge))
