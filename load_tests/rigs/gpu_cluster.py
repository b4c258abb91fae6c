"""What the cluster around an engine costs on a GPU: Ray, router and clients over Session, beside the bare engine.

    python -m load_tests.rigs.gpu_cluster --out FILE [--routers 1] [--tiny]

The same model, in files, is first opened by an engine that this process steps itself, and then by a cluster. Both
answer 256 streams of 128 + 256 tokens in a closed loop, and one prompt at a time. --tiny: a small model on the CPU,
which shows that everything works.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import uvloop
from octavo.client import Client

from load_tests.bars import Bar, at_least, at_most
from load_tests.rigs import gpu_cases, gpu_ladder
from load_tests.rigs.client_process import ClientProcess
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.rigs.gpu_cluster_time import Spent
from load_tests.rigs.plain_router import Answers

ROOT = Path(__file__).parents[2]
MODEL = "qwen3-0.6b"
TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
    "vocab_size": 2048,
}
PROMPT, OUTPUT = 128, 256
CLIENT_START_S = 1.0
"""What a client's process takes to begin, and more."""
SINGLES = 40
"""Prompts that are sent one at a time."""
NUM_FIRST = 5
"""Of these, not counted."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    streams: int = 256
    clients: int = 4
    duration_s: float = 12.0
    warm_up_s: float = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    tokens_per_s: float
    first_token_ms: float
    at_once_tokens_per_s: float | None = None
    """Of as many answers that all begin and end together."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.gpu_cluster", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--bare", type=Path, help="measure the bare engine over the model in this directory")
    arguments = parser.parse_args(argv)
    load = Load(streams=16, clients=2, duration_s=4.0, warm_up_s=1.0) if arguments.tiny else Load()
    if arguments.bare is not None:
        figures = measure_bare(arguments.bare, load, is_tiny=arguments.tiny)
        arguments.out.write_text(json.dumps(dataclasses.asdict(figures)))
        return 0
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        report = runner.run(measure(arguments, load))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)
    return 0 if all(bar["ok"] for bar in report["bars"]) else 1


async def measure(arguments: argparse.Namespace, load: Load) -> dict[str, Any]:
    """Return the figures of both and their bars."""
    from load_tests.rigs.gpu_model import write_model

    config = gpu_cases.CONFIGS[MODEL] | (TINY if arguments.tiny else {})
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        await asyncio.to_thread(write_model, model, config)
        out = Path(folder) / "bare.json"
        command = [sys.executable, "-m", "load_tests.rigs.gpu_cluster", "--bare", str(model), "--out", str(out)]
        await asyncio.to_thread(subprocess.run, command + ["--tiny"] * arguments.tiny, cwd=ROOT, check=True)
        bare = Figures(**json.loads(out.read_text()))
        began = time.monotonic()
        variables = {"OCTAVO_SERVE__NUM_ROUTERS": str(arguments.routers)}
        async with serving(_cluster(model, arguments, load), variables=variables) as cluster:
            start_s = time.monotonic() - began
            rate, spent = await _throughput(cluster, load)
            first_token_ms, first_token_spent = await first_tokens(cluster.address, _prompts(SINGLES))
            through = Figures(rate, first_token_ms)
    return {
        "model": MODEL,
        "workload": f"{load.streams} streams in {load.clients} processes, {PROMPT} + {OUTPUT} tokens",
        "routers": arguments.routers,
        "cluster_start_s": round(start_s, 1),
        "bare": dataclasses.asdict(bare),
        "cluster": dataclasses.asdict(through),
        "spent": spent,
        "first_token_spent": first_token_spent,
        "bars": [dataclasses.asdict(bar) for bar in bars_of(bare, through)],
    }


def bars_of(bare: Figures, through: Figures) -> list[Bar]:
    rates = f"{through.tokens_per_s:.0f} tokens/s through the cluster, {bare.tokens_per_s:.0f} of the bare engine"
    firsts = f"{through.first_token_ms:.2f} ms through the cluster, {bare.first_token_ms:.2f} of the bare engine"
    return [
        at_least("cluster: output tokens/s to the bare engine's", through.tokens_per_s / bare.tokens_per_s, 0.8, rates),
        at_most("cluster: first token, ms more", through.first_token_ms - bare.first_token_ms, 2.0, firsts),
    ]


def _cluster(model: Path, arguments: argparse.Namespace, load: Load) -> str:
    resources = "" if arguments.tiny else "\n[resources]\nnum_gpus = 1\n"
    return (
        f'model = "{model}"\n'
        f'[engine]\ndevice = "{"cpu" if arguments.tiny else "cuda"}"\n'
        f"max_num_sequences = {load.streams}\nmax_model_len = 2048\n{resources}"
    )


async def _throughput(cluster: Cluster, load: Load) -> tuple[float, dict[str, Any]]:
    """Return the tokens a second that all clients together got between warm-up and end, and what `Spent` says of most
    of that time."""
    streams = load.streams // load.clients

    async def one(seed: int) -> dict[str, Any]:
        job = {
            "target": cluster.address,
            "ca_file": "",
            "token": "",
            "call": "session",
            "streams": streams,
            "output": OUTPUT,
            "prompt": PROMPT,
            "duration_s": load.duration_s,
            "warm_up_s": load.warm_up_s,
            "requests": 0,
            "seed": seed,
            "clock": None,
            "is_staggered": True,
        }
        async with ClientProcess("lean_client", job) as client:
            return await client.ask({})

    async def watch() -> dict[str, Any]:
        await asyncio.sleep(load.warm_up_s + CLIENT_START_S)
        before = await asyncio.to_thread(Spent.now, cluster)
        await asyncio.sleep((load.duration_s - load.warm_up_s) / 2)
        return (await asyncio.to_thread(Spent.now, cluster)).since(before)

    spent, *reports = await asyncio.gather(watch(), *(one(seed) for seed in range(load.clients)))
    for report in reports:
        assert not report["errors"], report["errors"]
    rate = float(sum(report["tokens_timed"] for report in reports) / (load.duration_s - load.warm_up_s))
    return rate, spent


async def first_tokens(address: str, prompts: Sequence[Sequence[int]]) -> tuple[float, dict[str, float]]:
    """Ask one prompt after the other; return how long a first token took in ms, and on which part of the way: medians
    of all but the first few."""
    began: dict[str, tuple[float, float]] = {}
    async with Client(address) as client:
        for prompt in prompts:
            at, first_s = time.time(), 0.0
            generation = client.generate(prompt, max_tokens=8, temperature=0.0, ignore_eos=True)
            async for delta in generation:
                if not first_s and delta.token_ids:
                    first_s = time.time() - at
            began[generation.request_id] = (at, first_s)
        records = [(await client.find_requests(name))[0] for name in list(began)[NUM_FIRST:]]
    rows = []
    for record in records:
        at, first_s = began[record.request_id]
        attempt, engine_s = record.attempts[0], record.attempts[0].engine.queue_s + record.attempts[0].engine.prefill_s
        arrived_s = record.arrived_at - at
        rows.append(
            {
                "client_to_router_ms": arrived_s,
                "in_router_ms": attempt.sent_at_s,
                "engine_ms": engine_s,
                "to_replica_and_back_ms": attempt.first_token_at_s - attempt.sent_at_s - engine_s,
                "back_in_router_ms": record.first_sent_at_s - attempt.first_token_at_s,
                "router_to_client_ms": first_s - arrived_s - record.first_sent_at_s,
            }
        )
    spent = {name: round(1e3 * statistics.median(row[name] for row in rows), 3) for name in rows[0]}
    return 1e3 * statistics.median(first_s for _, first_s in list(began.values())[NUM_FIRST:]), spent


def measure_bare(model: Path, load: Load, *, is_tiny: bool) -> Figures:
    """Step the engine of `model` in this process; return what it reaches."""
    from cluster.models import fetch_model
    from workers import garbage
    from workers.build import build_engine, warm
    from workers.config import EngineConfig

    config = EngineConfig(
        device="cpu" if is_tiny else "cuda", max_num_sequences=load.streams, max_model_len=2048, threads=1
    )
    engine = build_engine(config, fetch_model(str(model)), hash_key=b"bare", threads=1)
    warm(engine)
    garbage.settle()
    works = gpu_ladder.Load(Answers(streams=load.streams, prompt=PROMPT, output=OUTPUT), 1)
    firsts = []
    for _ in range(SINGLES):
        began = time.perf_counter()
        engine.submit(works.work(8))
        first = None
        while engine.step():
            if engine.drain_outputs() and first is None:
                first = time.perf_counter() - began
        assert first is not None
        firsts.append(first)
    at_once = []
    for _ in range(2):
        began = time.perf_counter()
        for _ in range(load.streams):
            engine.submit(works.work(OUTPUT))
        while engine.step():
            engine.drain_outputs()
        at_once.append(load.streams * OUTPUT / (time.perf_counter() - began))
    for work in works.first():
        engine.submit(work)

    def run(seconds: float) -> float:
        """Return the tokens a second of so long a time."""
        began, before = time.perf_counter(), works.num_tokens
        while (now := time.perf_counter()) < began + seconds:
            engine.step()
            works.answer(engine)
        return (works.num_tokens - before) / (now - began)

    run(load.warm_up_s)
    rate = run(load.duration_s - load.warm_up_s)
    engine.close()
    return Figures(rate, 1e3 * statistics.median(firsts[NUM_FIRST:]), max(at_once))


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(2)
    return [rng.choices(range(300, 1_000), k=PROMPT) for _ in range(count)]


if __name__ == "__main__":
    sys.exit(main())
