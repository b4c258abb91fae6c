"""What telemetry costs in conc16, the workload of sixteen streams of the default model: three clusters, in turns.

    off      OTEL_SDK_DISABLED, no metrics
    unkept   metrics, asked for every few seconds; a collector, and OTEL_TRACES_SAMPLER_ARG=0.0: no span is kept
    kept     the same at ratio 1.0: every span is kept and exported

Each repetition gives the same prompts to all three, one after the other, in another order, and compares within itself;
the median of the repetitions is judged. The clusters that wait are idle, the collector takes everything and is on the
same cores. Beside throughput, which says little on a machine that does other things too, stands the processor time
that all processes of a cluster took for a token. Seven minutes on a quiet machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import sys
import urllib.request
from collections.abc import AsyncIterator, Mapping
from typing import Final

from octavo.client import Client

from load_tests import process_tree
from load_tests.bars import Bar, at_most
from load_tests.chaos.collector import Collector
from load_tests.measurement import measure as measure_workload
from load_tests.natural_text import NaturalText
from load_tests.notes import Notes, figure
from load_tests.octavo_driver import OctavoDriver
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.workloads import WORKLOADS, make_prompts, warm_up_prompts

OFF, UNKEPT, KEPT = WAYS = ("off", "unkept", "kept")
CONFIG: Final = 'model = "default"\n[replicas]\nnum_replicas = 1\n[engine]\nthreads = 2\n'
SCRAPE_S: Final = 5.0
SEED: Final = 8
MAX_LOSS: Final = {KEPT: 0.03, UNKEPT: 0.01}
"""Shares of the throughput; a hundredth is what such runs differ by themselves on a quiet machine."""
MIN_REPETITIONS: Final = 5


def variables(way: str, endpoint: str) -> dict[str, str]:
    if way == OFF:
        return {"OTEL_SDK_DISABLED": "true", "OCTAVO_TELEMETRY__METRICS": "false"}
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "1.0" if way == KEPT else "0.0",
    }


async def measure(settings: Settings, notes: Notes) -> None:
    workload = next(each for each in WORKLOADS if each.name == "conc16")
    workload = workload.shortened() if settings.is_quick else workload
    async with contextlib.AsyncExitStack() as scope:
        collector = await scope.enter_async_context(Collector())
        clusters = {way: await scope.enter_async_context(_serving(way, collector)) for way in WAYS}
        async with Client(clusters[OFF].address) as client:
            text = await NaturalText.ask(client.tokenize)
        drivers = {way: await scope.enter_async_context(OctavoDriver(each.address)) for way, each in clusters.items()}
        for driver in drivers.values():
            for prompt in warm_up_prompts(seed=SEED, repetition=0):
                await driver.ask(prompt, 8)
        for repetition in range(1 if settings.is_quick else max(settings.repetitions, MIN_REPETITIONS)):
            prompts = make_prompts(workload, text, seed=SEED, repetition=repetition)
            for way in (*WAYS[repetition % 3 :], *WAYS[: repetition % 3]):
                exports, before = collector.num_exports, _cpu_s(clusters[way])
                async with _scraped(clusters[way]):
                    found, _ = await measure_workload(drivers[way], workload, prompts)
                tokens = workload.requests * workload.output
                notes.add(
                    way,
                    tokens_per_s=found.output_tokens_per_s,
                    cpu_us_per_token=1e6 * (_cpu_s(clusters[way]) - before) / tokens,
                    first_token_p50_ms=found.first_token_p50_ms,
                    per_token_p50_ms=found.per_token_p50_ms,
                    exports=collector.num_exports - exports,
                )


@contextlib.asynccontextmanager
async def _serving(way: str, collector: Collector) -> AsyncIterator[Cluster]:
    async with serving(CONFIG, variables=variables(way, collector.endpoint)) as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def _scraped(cluster: Cluster) -> AsyncIterator[None]:
    """Ask for all metrics every few seconds, as Prometheus does, where they are told."""

    def scrape() -> None:
        with urllib.request.urlopen(cluster.ready["metrics"], timeout=10) as answer:
            answer.read()

    async def run() -> None:
        while True:
            await asyncio.sleep(SCRAPE_S)
            await asyncio.to_thread(scrape)

    task = asyncio.create_task(run()) if cluster.ready["metrics"] else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _cpu_s(cluster: Cluster) -> float:
    return sum(process_tree.cpu_s(process.pid) for process in process_tree.tree(cluster.pid))


def judge(notes: Notes) -> list[Bar]:
    return [
        _bar(notes, "ratio 1.0: share of tokens/s lost in conc16", KEPT),
        _bar(notes, "ratio 0.0: share of tokens/s lost in conc16", UNKEPT),
    ]


def _bar(notes: Notes, name: str, way: str) -> Bar:
    lost = _losses(notes, way, "tokens_per_s", lambda off, on: 1 - on / off)
    cpu = _losses(notes, way, "cpu_us_per_token", lambda off, on: on / off - 1)
    runs: Mapping[str, float | None] = {each: notes.median(each, "tokens_per_s") for each in (OFF, way)}
    detail = f"tokens/s {figure(runs[OFF])} -> {figure(runs[way])}; "
    detail += f"CPU a token {figure(statistics.median(cpu) if cpu else None)} more; repetitions "
    detail += ", ".join(f"{each:+.3f}" for each in lost)
    return at_most(name, statistics.median(lost) if lost else None, MAX_LOSS[way], detail)


def _losses(notes: Notes, way: str, key: str, compare: object) -> list[float]:
    """Return what each repetition's pair compares to."""
    assert callable(compare)
    return [compare(off, on) for off, on in zip(notes.of(OFF, key), notes.of(way, key), strict=False)]


if __name__ == "__main__":
    sys.exit(main("telemetry_cost", measure, judge))
