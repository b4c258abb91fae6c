"""`make bench`: starts one replica of the default model, drives it over gRPC, writes load_tests/results/octavo.json.

Four workloads, each greedy and to its full length, with token-id prompts that no run before has sent:

    single   1 request at a time           64 prompt + 128 output tokens
    conc16   16 at a time, 48 requests    128 prompt + 128 output tokens
    prefix   16 at a time, 48 requests    512 shared + 32 own prompt, 64 output tokens
    longin    4 at a time,  8 requests  1,024 prompt +  16 output tokens

Measures, and judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from octavo.client import Client

RESULTS = Path(__file__).parent / "results"
VOCABULARY = range(200, 49_000)
"""Token ids of prompts: ordinary tokens of the default model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    name: str
    requests: int
    concurrency: int
    shared: int
    own: int
    output: int


WORKLOADS = (
    Workload(name="single", requests=3, concurrency=1, shared=0, own=64, output=128),
    Workload(name="conc16", requests=48, concurrency=16, shared=0, own=128, output=128),
    Workload(name="prefix", requests=48, concurrency=16, shared=512, own=32, output=64),
    Workload(name="longin", requests=8, concurrency=4, shared=0, own=1024, output=16),
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: seconds to its first token and to its end, and its counts of tokens."""

    first_token_s: float
    total_s: float
    num_tokens: int
    num_cached: int


@contextmanager
def cluster(arguments: list[str]) -> Iterator[dict[str, object]]:
    """Run `octavo serve` on a free port; yield what it announced."""
    command = [str(Path(sys.executable).with_name("octavo")), "serve", "--port", "0", "--replicas", "1", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            line = child.stdout.readline()
            if not line:
                raise SystemExit("bench: octavo serve did not start; it says above why")
            yield json.loads(line)
        finally:
            child.send_signal(signal.SIGTERM)


async def ask(client: Client, prompt: list[int], output: int) -> Sample:
    begin = time.perf_counter()
    first = None
    generation = client.generate(prompt, max_tokens=output, temperature=0.0, ignore_eos=True)
    async for delta in generation:
        if first is None and delta.token_ids:
            first = time.perf_counter()
    end = time.perf_counter()
    usage = generation.usage
    assert first is not None
    assert usage is not None
    return Sample(first - begin, end - begin, usage.generated_tokens, usage.cached_tokens)


async def run(client: Client, workload: Workload, rng: random.Random) -> dict[str, object]:
    shared = rng.choices(VOCABULARY, k=workload.shared)
    prompts = [shared + rng.choices(VOCABULARY, k=workload.own) for _ in range(workload.requests)]
    slots = asyncio.Semaphore(workload.concurrency)

    async def one(prompt: list[int]) -> Sample:
        async with slots:
            return await ask(client, prompt, workload.output)

    begin = time.perf_counter()
    samples = await asyncio.gather(*(one(prompt) for prompt in prompts))
    wall = time.perf_counter() - begin
    firsts = sorted(s.first_token_s for s in samples)
    tokens = sum(s.num_tokens for s in samples)
    return {
        "workload": workload.name,
        "requests": len(samples),
        "wall_s": round(wall, 3),
        "output_tokens_per_s": round(tokens / wall, 1),
        "requests_per_s": round(len(samples) / wall, 3),
        "first_token_p50_ms": round(1e3 * statistics.median(firsts), 1),
        "first_token_max_ms": round(1e3 * firsts[-1], 1),
        "per_token_p50_ms": round(
            1e3 * statistics.median((s.total_s - s.first_token_s) / max(1, s.num_tokens - 1) for s in samples), 2
        ),
        "cached_tokens": sum(s.num_cached for s in samples),
    }


async def drive(address: str, names: list[str], seed: int) -> list[dict[str, object]]:
    rng = random.Random(seed)
    rows = []
    async with Client(address) as client:
        await asyncio.gather(*(ask(client, rng.choices(VOCABULARY, k=20), 8) for _ in range(2)))
        for workload in WORKLOADS:
            if workload.name in names:
                rows.append(await run(client, workload, rng))
                print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(w.name for w in WORKLOADS), help="workloads, comma separated")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="of the prompts; default: a new one")
    parser.add_argument("--out", type=Path, default=RESULTS / "octavo.json")
    parser.add_argument("serve", nargs="*", help="arguments for octavo serve, after --")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with cluster(arguments.serve) as ready:
        rows = asyncio.run(drive(str(ready["address"]), arguments.only.split(","), arguments.seed))
    report = {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "load_before": round(load, 2),
        "command": "make bench",
        "seed": arguments.seed,
        "version": ready["version"],
        "workloads": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"bench: wrote {arguments.out}")


if __name__ == "__main__":
    main()
