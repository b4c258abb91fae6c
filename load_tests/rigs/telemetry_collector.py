"""A collector that is dead, mute or well, in turns, behind one cluster that keeps every span, under a steady load.

    well   it takes every export          dead   nobody listens on its port         mute   it never answers

Latency is compared with the collector being well just before, so that what else the machine does cancels out; the
median of the repetitions is judged. Memory of router and replica must not grow over all of it, once the queues of spans
have been full for the first time, and what was lost must be counted by both. Fake engine; three minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Final

from load_tests.bars import Bar, at_least, at_most
from load_tests.chaos.collector import Collector
from load_tests.measurement import Sample
from load_tests.notes import Notes, figure
from load_tests.octavo_driver import OctavoDriver
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving

CONFIG: Final = 'model = "fake"\n[replicas]\nnum_replicas = 1\n[engine]\nengine = "fake"\nfake_step_s = 0.005\n'
STREAMS, PROMPT_TOKENS, TOKENS, PHASE_S = 8, 32, 16, 12.0
ILL: Final = ("dead", "mute")
MAX_ADDED_MS, MAX_ADDED_SHARE, MAX_GROWTH_MIB = 0.5, 0.05, 8.0
VARIABLES: Final = {
    "OTEL_BSP_SCHEDULE_DELAY": "200",
    "OTEL_BSP_MAX_QUEUE_SIZE": "1024",
    "OTEL_EXPORTER_OTLP_TIMEOUT": "3",
    "OTEL_METRIC_EXPORT_INTERVAL": "2000",
    "OCTAVO_TELEMETRY__MAX_KEPT_REQUESTS": "64",
}
"""Queues, and all that is kept of requests, are full after a few seconds."""


async def measure(settings: Settings, notes: Notes) -> None:
    async with Collector() as collector:
        variables = {**VARIABLES, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        async with serving(CONFIG, variables=variables) as cluster, OctavoDriver(cluster.address) as driver:
            await _load(driver, settings.seconds(5.0, 1.0))
            for _ in settings.rounds():
                for kind in ILL:
                    await _phase(settings, notes, cluster, driver, before=kind, kind="well")
                    async with _ill(collector, kind):
                        await _phase(settings, notes, cluster, driver, before=kind, kind=kind)


def _ill(collector: Collector, kind: str) -> AbstractAsyncContextManager[None]:
    return collector.dead() if kind == "dead" else _mute(collector)


@contextlib.asynccontextmanager
async def _mute(collector: Collector):  # type: ignore[no-untyped-def]  # a generator for the decorator
    with collector.mute():
        yield


async def _phase(
    settings: Settings, notes: Notes, cluster: Cluster, driver: OctavoDriver, *, before: str, kind: str
) -> None:
    lost = await asyncio.to_thread(_dropped, cluster)
    samples = await _load(driver, settings.seconds(PHASE_S))
    now = await asyncio.to_thread(_dropped, cluster)
    firsts = sorted(1e3 * sample.first_token_s for sample in samples)
    totals = sorted(1e3 * sample.total_s for sample in samples)
    notes.add(
        kind if kind in ILL else f"{kind} before {before}",
        requests=len(samples),
        first_token_p50_ms=statistics.median(firsts),
        first_token_p99_ms=firsts[len(firsts) * 99 // 100],
        total_p50_ms=statistics.median(totals),
        total_p99_ms=totals[len(totals) * 99 // 100],
        dropped_router=now["router"] - lost["router"],
        dropped_replica=now["replica"] - lost["replica"],
        router_mib=_resident_mib(cluster, "router"),
        replica_mib=_resident_mib(cluster, "replica"),
    )


async def _load(driver: OctavoDriver, seconds: float) -> list[Sample]:
    """Keep `STREAMS` answers going for a while."""
    samples: list[Sample] = []
    end = time.monotonic() + seconds

    async def stream(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            samples.append(await driver.ask(rng.choices(range(300, 1_000), k=PROMPT_TOKENS), TOKENS))

    await asyncio.gather(*map(stream, range(STREAMS)))
    return samples


def _dropped(cluster: Cluster) -> dict[str, float]:
    """Return how many spans each kind of process has lost so far, by its own count."""
    return {role: _told(cluster, "octavo_telemetry_dropped_spans_total", role) for role in ("router", "replica")}


def _resident_mib(cluster: Cluster, role: str) -> float:
    return _told(cluster, "process_resident_memory_bytes", role) / 2**20


def _told(cluster: Cluster, name: str, role: str) -> float:
    with urllib.request.urlopen(cluster.ready["metrics"], timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    process = f'process="{role}"'
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name) and process in line)


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for kind in ILL:
        added = _compared(notes, kind, "first_token_p50_ms", lambda well, ill: ill - well)
        shares = _compared(notes, kind, "total_p50_ms", lambda well, ill: ill / well - 1)
        bars += [
            at_most(
                f"collector {kind}: added to the first token, p50, ms",
                added,
                MAX_ADDED_MS,
                _detail(notes, kind, "first_token"),
            ),
            at_most(
                f"collector {kind}: share added to an answer, p50",
                shares,
                MAX_ADDED_SHARE,
                _detail(notes, kind, "total"),
            ),
            at_least(
                f"collector {kind}: spans lost that router and replica count, the fewer of both",
                min((notes.total(kind, f"dropped_{role}") or 0.0 for role in ("router", "replica")), default=None),
                1,
                f"while it is well again, what had waited: {figure(_lost_while_well(notes))}",
            ),
        ]
    for role in ("router", "replica"):
        sizes = [run[f"{role}_mib"] for run in notes.runs]
        # From the second phase with an ill collector on, when every queue has been full once.
        grown = max(sizes[3:]) - max(sizes[1:3]) if len(sizes) > 3 else None
        detail = " ".join(f"{size:.0f}" for size in sizes)
        bars.append(at_most(f"growth of the {role} once its queue has been full, MiB", grown, MAX_GROWTH_MIB, detail))
    return bars


def _compared(notes: Notes, kind: str, key: str, compare: Callable[[float, float], float]) -> float | None:
    pairs = zip(notes.of(f"well before {kind}", key), notes.of(kind, key), strict=False)
    compared = [compare(well, ill) for well, ill in pairs]
    return statistics.median(compared) if compared else None


def _detail(notes: Notes, kind: str, what: str) -> str:
    quantiles = []
    for quantile in ("p50", "p99"):
        well, ill = (notes.median(each, f"{what}_{quantile}_ms") for each in (f"well before {kind}", kind))
        quantiles.append(f"{quantile} {figure(well)} -> {figure(ill)} ms")
    return ", ".join(quantiles)


def _lost_while_well(notes: Notes) -> float:
    wells = [run for run in notes.runs if run["what"].startswith("well")]
    return sum(run["dropped_router"] + run["dropped_replica"] for run in wells)


if __name__ == "__main__":
    sys.exit(main("telemetry_collector", measure, judge))
