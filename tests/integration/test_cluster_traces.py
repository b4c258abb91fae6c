"""Traces of a running cluster, held to what clients were told; `make bench-telemetry` does the same at length."""

from __future__ import annotations

import asyncio
import math
import time
import urllib.request
from pathlib import Path

import pytest
from octavo.metrics import REQUEST_DURATION
from octavo.names import Span as SpanName

from load_tests.rigs.traced_asks import asking
from load_tests.slow_steps import hold_up, members, slow_steps, wrongly_told
from load_tests.span_collector import Span
from load_tests.trace_trees import Answer, Tree, miscounted, trees_of, unlinked_batches, unlinked_steps
from tests.cluster import ClusterProcess
from tests.collector import Collector

pytestmark = pytest.mark.cluster
NUM_REQUESTS = 60
STALL_S = 2.0
"""Longer than this machine may hold up a process of its own accord."""
EXPORT_S = 60.0


async def ask(cluster: ClusterProcess, num_requests: int, num_tokens: int) -> list[Answer]:
    """Ask so much at once, half of it over Session and half over Generate."""
    async with asking(cluster.address, seed=num_requests) as asker:
        return await asyncio.gather(
            *(
                asker.ask(("session", "generate")[n % 2], characters=20 + 5 * n, num_tokens=num_tokens + n % 9)
                for n in range(num_requests)
            )
        )


def spans_of(collector: Collector, answers: list[Answer], num_before: int) -> list[Span]:
    """Return the spans after the first `num_before`, once those of all answers are there."""
    traces, give_up = {answer.trace_id for answer in answers}, time.monotonic() + EXPORT_S
    while True:
        spans = collector.since(num_before)
        num_decodes = sum(span.name == SpanName.DECODE and span.trace_id in traces for span in spans)
        num_delivers = sum(span.name == SpanName.DELIVER and span.trace_id in traces for span in spans)
        if num_decodes == num_delivers == len(traces) and _has_all_steps(spans):
            return spans
        assert time.monotonic() < give_up, f"{num_decodes} and {num_delivers} of {len(traces)} came"
        time.sleep(0.1)


def _has_all_steps(spans: list[Span]) -> bool:
    """Whether the last step that anybody names of each replica is there."""
    decodes = [span for span in spans if span.name == SpanName.DECODE and "octavo.step.last" in span.attributes]
    told = {(s.attributes["octavo.replica.id"], s.attributes["octavo.step"]) for s in spans if s.name == SpanName.STEP}
    return all((s.attributes["octavo.replica.id"], s.attributes["octavo.step.last"]) in told for s in decodes)


def whole_trees(answers: list[Answer], spans: list[Span]) -> list[Tree]:
    trees, wrong = trees_of(answers, spans)
    assert wrong == []
    return list(trees.values())


async def test_each_request_is_one_whole_tree_and_each_batch_and_step_has_all_its_members(
    fake_cluster: ClusterProcess, collector: Collector
) -> None:
    num_before = len(collector.since())
    answers = await ask(fake_cluster, NUM_REQUESTS, 4)
    spans = await asyncio.to_thread(spans_of, collector, answers, num_before)
    trees = whole_trees(answers, spans)
    assert len(trees) == NUM_REQUESTS
    by_trace = {tree.server.trace_id: tree for tree in trees}
    assert [text for answer in answers for text in miscounted(answer, by_trace[answer.trace_id])] == []
    assert unlinked_batches(trees, spans) == []
    assert unlinked_steps(trees, spans) == []
    assert min(tree.coverage() for tree in trees) >= 0.95
    assert max(len(span.links) for span in spans if span.name == SpanName.STEP) > 1, "they were computed together"
    assert {len(span.links) for span in spans if span.name == SpanName.BATCH} != {1}, "some went together"


async def test_a_slow_step_shows_in_whoever_was_in_it_and_in_the_percentiles(
    fake_cluster: ClusterProcess, collector: Collector, stall_file: Path
) -> None:
    metrics = fake_cluster.ready["metrics"]
    start = await asyncio.to_thread(buckets, metrics)
    for _ in range(3):
        await ask(fake_cluster, 16, 16)
    calm = await asyncio.to_thread(buckets, metrics)
    num_before = len(collector.since())
    answers = await ask(fake_cluster, 16, 16)
    held_up, at_ns = await asyncio.gather(ask(fake_cluster, 16, 40), meddle(stall_file))
    answers += held_up
    answers += await ask(fake_cluster, 16, 16)
    after = await asyncio.to_thread(buckets, metrics)
    spans = await asyncio.to_thread(spans_of, collector, answers, num_before)
    trees = whole_trees(answers, spans)
    (slow,) = slow_steps(spans, STALL_S, at_ns)
    assert 1 <= len(members(slow, trees)) == len(slow.links) < len(answers)
    assert wrongly_told(slow, trees) == set()
    assert slow.attributes["octavo.step.run_s"] >= STALL_S
    assert quantile(0.99, calm, after) > quantile(0.99, start, calm)


async def meddle(stall_file: Path) -> int:
    """Have one step of one replica take longer, a moment later; return when."""
    await asyncio.sleep(0.1)
    return await hold_up(stall_file, STALL_S)


def buckets(address: str) -> dict[float, float]:
    """Return the cumulative buckets of what requests took, of all processes together."""
    found: dict[float, float] = {}
    name = f"{REQUEST_DURATION.text_name}_bucket{{"
    with urllib.request.urlopen(address, timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    for line in lines:
        if line.startswith(name):
            bound = float(line.partition('le="')[2].partition('"')[0])
            found[bound] = found.get(bound, 0.0) + float(line.rpartition(" ")[2])
    return found


def quantile(share: float, before: dict[float, float], after: dict[float, float]) -> float:
    """Return what Prometheus's histogram_quantile says of what came in between."""
    counts = {bound: count - before.get(bound, 0.0) for bound, count in sorted(after.items())}
    rank, least, below = share * counts[math.inf], 0.0, 0.0
    for bound, count in counts.items():
        if count >= rank:
            return least if bound == math.inf else least + (bound - least) * (rank - below) / (count - below)
        least, below = bound, count
    raise AssertionError("nothing came in between")
