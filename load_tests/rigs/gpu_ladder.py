"""Which layer around a fast engine costs what: the same engine with one more of them at each rung.

    python -m load_tests.rigs.gpu_ladder --out FILE [--clock]

    hand     stepped in a loop
    thread   behind `EngineThread`, whose notifications are answered in its own thread
    port     behind a data port, whose stream another process reads

The last rung is `gpu_cluster`. Each keeps 256 answers of 128 + 256 tokens going. Of each: tokens/s, rows a step, how
many steps had a prompt, what a step took and of what (the phases of `StepWatch`, and of "run" what launching took),
and how busy the process's threads were. --clock: over a device that is a clock, where there is no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests import process_tree
from load_tests.rigs import gpu_cases
from load_tests.rigs.client_process import ClientProcess
from load_tests.rigs.clock_device import StepTimes, open_clock_engine
from load_tests.rigs.plain_router import VOCABULARY, Answers
from workers import garbage
from workers.data_plane import DataPlaneServer
from workers.engine import PagedEngine
from workers.handshake import ClusterKeys
from workers.plan import Runner, StepPlan, Ticket
from workers.step_watch import StepRecord, StepWatch
from workers.thread import EngineThread
from workers.types import GenerateWork, SamplingParams, WorkId

MODEL = "qwen3-0.6b"
ANSWERS = Answers(streams=256, prompt=128, output=256)
SECRET = b"s" * 32
REPLICA = "replica-0"
WARM_UP_S, DURATION_S = 3.0, 8.0


@dataclass(slots=True)
class TimedRunner:
    """A runner whose launches are timed."""

    runner: Runner
    launches_s: list[float] = field(default_factory=list)

    def launch(self, plan: StepPlan) -> Ticket:
        began = time.perf_counter()
        ticket = self.runner.launch(plan)
        self.launches_s.append(time.perf_counter() - began)
        return ticket

    def close(self) -> None:
        self.runner.close()


class News:
    """Whoever listens to an engine's thread, one after the other."""

    listener: Callable[[], None] | None = None

    def tell(self) -> None:
        if self.listener is not None:
            self.listener()


class Load:
    """Works for an engine in this process: a new one for each that ends. Prompts of another `seed` are others, so that
    no rung finds those of the one before in the cache."""

    def __init__(self, answers: Answers, seed: int) -> None:
        self._answers = answers
        self._random = random.Random(seed)
        self._number = 0
        self.num_tokens = 0

    def first(self) -> Iterator[GenerateWork]:
        streams, output = self._answers.streams, self._answers.output
        return (self.work(max(1, output * (stream + 1) // streams)) for stream in range(streams))

    def work(self, length: int) -> GenerateWork:
        self._number += 1
        prompt = self._random.choices(VOCABULARY, k=self._answers.prompt)
        greedy = SamplingParams(temperature=0.0)
        return GenerateWork(work_id=WorkId("ladder", self._number), prompt=prompt, max_tokens=length, sampling=greedy)

    def answer(self, engine: PagedEngine | EngineThread) -> None:
        """Take what `engine` has brought, as a cluster does, and replace what has ended."""
        for delta in engine.drain_outputs():
            self.num_tokens += len(delta.token_ids)
            if delta.finish is not None:
                engine.submit(self.work(self._answers.output))
        engine.kv_events()


@dataclass(slots=True)
class Rung:
    """What is measured between `begin` and `end`."""

    timed: TimedRunner
    began: float = 0.0
    tokens: int = 0
    threads: dict[int, float] = field(default_factory=dict)
    records: list[StepRecord] = field(default_factory=list)

    def begin(self, num_tokens: int) -> None:
        self.began, self.tokens = time.perf_counter(), num_tokens
        self.threads = process_tree.thread_times_s(os.getpid())
        self.records.clear()
        self.timed.launches_s.clear()

    def end(self, num_tokens: int) -> dict[str, Any]:
        seconds = time.perf_counter() - self.began
        now = process_tree.thread_times_s(os.getpid())
        busy = sorted(((s - self.threads.get(thread, 0.0)) / seconds for thread, s in now.items()), reverse=True)
        records, launches = list(self.records), list(self.timed.launches_s)
        mixed = [record for record in records if any(chunk.num_tokens > 1 for chunk in record.plan.chunks)]

        def mean_ms(values: Sequence[float]) -> float:
            return round(1e3 * statistics.fmean(values), 3) if values else 0.0

        return {
            "tokens_per_s": round((num_tokens - self.tokens) / seconds),
            "steps_per_s": round(len(records) / seconds, 1),
            "step_ms": round(1e3 * seconds / max(1, len(records)), 3),
            "rows": round(statistics.fmean(len(record.plan.chunks) for record in records), 1) if records else 0,
            "mixed": round(len(mixed) / max(1, len(records)), 3),
            "schedule_ms": mean_ms([record.schedule_s for record in records]),
            "run_ms": mean_ms([record.run_s for record in records]),
            "emit_ms": mean_ms([record.emit_s for record in records]),
            "launch_ms": mean_ms(launches),
            "longest_launch_ms": round(1e3 * max(launches, default=0.0), 3),
            "busy": [round(share, 3) for share in busy[:4]],
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.gpu_ladder", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file")
    parser.add_argument("--clock", action="store_true")
    parser.add_argument("--duration", type=float, default=DURATION_S, metavar="SECONDS")
    arguments = parser.parse_args(argv)
    engine = _open(is_clock=arguments.clock)
    timed = engine._runner = TimedRunner(engine._runner)
    garbage.settle()
    report = {"device": "clock" if arguments.clock else MODEL, "hand": by_hand(engine, timed, arguments.duration)}
    report |= asyncio.run(above(engine, timed, arguments.duration))
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)
    return 0


def _open(*, is_clock: bool) -> PagedEngine:
    hash_key = ClusterKeys.derive(SECRET).prefix_hash
    if is_clock:
        return open_clock_engine(StepTimes(), hash_key=hash_key, max_num_sequences=ANSWERS.streams)
    from load_tests.rigs.gpu_engine import open_engine

    return open_engine(gpu_cases.CONFIGS[MODEL], hash_key=hash_key, max_num_sequences=ANSWERS.streams)


def by_hand(engine: PagedEngine, timed: TimedRunner, duration_s: float) -> dict[str, Any]:
    load, rung, watch = Load(ANSWERS, 1), Rung(timed), engine.watch()
    for work in load.first():
        engine.submit(work)

    def run(seconds: float) -> None:
        give_up = time.perf_counter() + seconds
        while time.perf_counter() < give_up:
            engine.step()
            load.answer(engine)
            watch.ended()
            rung.records += watch.drain()

    run(WARM_UP_S)
    rung.begin(load.num_tokens)
    run(duration_s)
    report = rung.end(load.num_tokens)
    for work_id in list(engine._works):
        engine.abort(work_id)
    while engine.step():
        pass
    engine.drain_outputs()
    return report


async def above(engine: PagedEngine, timed: TimedRunner, duration_s: float) -> dict[str, Any]:
    """Return the reports of the rungs above the first."""
    load, news = Load(ANSWERS, 2), News()
    thread = EngineThread(engine, news.tell, max_token_age_s=engine._config.max_token_age_s)
    watch = thread.watch()
    reports = {}
    try:
        news.listener = lambda: load.answer(thread)
        for work in load.first():
            thread.submit(work)
        await asyncio.sleep(WARM_UP_S)
        reports["thread"] = await _timed(Rung(timed), watch, lambda: load.num_tokens, duration_s)
        news.listener = None
        await _empty(thread)
        server = DataPlaneServer(replica_id=REPLICA, key=ClusterKeys.derive(SECRET).data_plane)
        await server.start(thread)
        news.listener = server.notify
        job = {"target": server.address, "replica_id": REPLICA, "secret": SECRET.hex()}
        async with ClientProcess("plain_router_process", job) as client:
            before = await client.ask({"after_s": WARM_UP_S})
            watch.drain()
            (rung := Rung(timed)).begin(before["tokens"])
            after = await client.ask({"after_s": duration_s})
            rung.records += watch.drain()
            num_messages = after["messages"] - before["messages"]
            reports["port"] = rung.end(after["tokens"]) | {"messages_per_s": round(num_messages / duration_s, 1)}
        await server.stop(0.1)
    finally:
        thread.close()
        await asyncio.to_thread(thread.join, 10.0)
    return reports


async def _timed(rung: Rung, watch: StepWatch, num_tokens: Callable[[], int], duration_s: float) -> dict[str, Any]:
    watch.drain()
    rung.begin(num_tokens())
    await asyncio.sleep(duration_s)
    rung.records += watch.drain()
    return rung.end(num_tokens())


async def _empty(thread: EngineThread) -> None:
    """Let all that runs end."""
    while thread.load().num_running or thread.load().num_waiting:
        thread.drain_outputs()
        await asyncio.sleep(0.01)
    thread.drain_outputs()
    thread.kv_events()


if __name__ == "__main__":
    sys.exit(main())
