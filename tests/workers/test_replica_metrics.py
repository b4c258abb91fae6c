"""Each metric of the table that a replica has, made of the paged engine over a toy runner and of the fake engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from octavo import metrics as names
from octavo.metrics import CATALOGUE, Metric
from octavo.names import Attribute
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader

from tests.workers.toy_engine import ToyEngine, ToyRunner, work
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.fake import FakeEngine, fake_manifest
from workers.metrics import ReplicaMetrics
from workers.step_telemetry import StepTelemetry, observe
from workers.types import WorkId

MODEL = "mine"
"""What requests call it, whatever its files do."""
OF_REPLICAS = [metric for metric in CATALOGUE if metric.where == "replica"]


class Observed:
    """An engine whose metrics are collected, stepped by hand as its thread and data plane would."""

    def __init__(self, engine: PagedEngine) -> None:
        self.engine = engine
        self._reader = InMemoryMetricReader()
        meter = MeterProvider([self._reader], shutdown_on_exit=False).get_meter("test")
        self._watch = engine.watch()
        self._steps = StepTelemetry(self._watch, ReplicaMetrics(meter, engine, MODEL, engine.counts), "one")

    def step(self) -> bool:
        is_busy = self.engine.step()
        self._watch.ended()
        self._steps.tell({})
        return is_busy

    def run(self) -> None:
        while self.step():
            pass

    def points(self, metric: Metric) -> list[Any]:
        data = self._reader.get_metrics_data()
        assert data is not None
        found = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == metric.name]
        return [point for each in found for point in each.data.data_points]

    def value(self, metric: Metric, **attributes: str) -> float:
        """Return a counter's or gauge's value, or how often a histogram was told."""
        values = [
            point.count if isinstance(point, HistogramDataPoint) else point.value
            for point in self.points(metric)
            if attributes.items() <= dict(point.attributes).items()
        ]
        (value,) = values
        return float(value)


def make_paged() -> PagedEngine:
    engine = ToyEngine(8, chunk_tokens=6, lookup_tokens=2, runner=ToyRunner(8, vocab_size=2), max_num_sequences=2)
    engine._clock = time.monotonic
    return engine


def make_fake() -> PagedEngine:
    config = EngineConfig(
        engine="fake", block_size=4, num_blocks=8, chunk_tokens=6, lookup_tokens=2, max_num_sequences=2
    )
    return FakeEngine(config, manifest=fake_manifest(vocab_size=2, eos_token_ids=()))


@pytest.fixture(params=[make_paged, make_fake], ids=["paged", "fake"])
def observed(request: pytest.FixtureRequest) -> Observed:
    make: Callable[[], PagedEngine] = request.param
    return Observed(make())


def exercise(observed: Observed) -> None:
    """Everything that can happen to sequences and blocks: a cache hit, a draft that is right, a preemption, an
    eviction, three steps for a prompt. Two run at the end, and one waits."""
    engine = observed.engine
    for number in (1, 2):
        engine.submit(work(number, [0, 1] * 5, 3))
        observed.run()
    engine.submit(work(3, [1, 0] * 5, 12))
    engine.submit(work(4, [1] * 8, 12))
    observed.run()
    for number in (5, 6, 7):
        engine.submit(work(number, [1, 1, 0], 8))
    observed.step()


@pytest.mark.parametrize("metric", OF_REPLICAS, ids=lambda metric: metric.name)
def test_each_metric_is_recorded(observed: Observed, metric: Metric) -> None:
    exercise(observed)
    if metric is names.ENGINE_OWED_TOKENS:
        observed.engine.submit(work(8, range(2), 3))
    points = observed.points(metric)
    assert points
    for point in points:
        assert set(point.attributes) == set(metric.attributes)
        assert point.attributes[Attribute.REQUEST_MODEL] == MODEL
    numbers = [point.count if isinstance(point, HistogramDataPoint) else point.value for point in points]
    assert max(numbers) > 0


def test_what_load_and_counts_say_is_what_is_told(observed: Observed) -> None:
    exercise(observed)
    load, counts = observed.engine.load(), observed.engine.counts()
    expected = {
        names.ENGINE_RUNNING: load.num_running,
        names.ENGINE_WAITING: load.num_waiting,
        names.PREFIX_CACHE_QUERIES: load.prefix_cache_queries,
        names.PREFIX_CACHE_HITS: load.prefix_cache_hits,
        names.PREFIX_CACHE_EVICTIONS: counts.num_evicted_blocks,
        names.PREEMPTIONS: load.num_preemptions,
        names.PROMPT_TOKENS: counts.num_prompt_tokens,
        names.GENERATED_TOKENS: counts.num_generated_tokens,
        names.COMPUTED_TOKENS: load.num_computed_tokens,
        names.DRAFTED_TOKENS: load.num_drafted_tokens,
        names.ACCEPTED_TOKENS: load.num_accepted_tokens,
        names.STEPS: load.num_steps,
        names.STEP_DURATION: load.num_steps,
        names.KV_USAGE: 1 - load.num_free_blocks / load.num_blocks,
    }
    assert {metric.name: observed.value(metric) for metric in expected} == {m.name: n for m, n in expected.items()}
    assert load.num_waiting == 1


def test_blocks_are_used_or_cached_or_free(observed: Observed) -> None:
    def blocks(state: str) -> float:
        return observed.value(names.KV_BLOCKS, **{Attribute.BLOCK_STATE: state})

    assert (blocks("used"), blocks("cached"), blocks("free")) == (0, 0, 8)
    observed.engine.submit(work(1, [0, 1] * 5, 3))
    observed.step()
    assert (blocks("used"), blocks("cached"), blocks("free")) == (3, 0, 5)
    observed.run()
    assert (blocks("used"), blocks("cached"), blocks("free")) == (0, 3, 5)


def test_tokens_add_up(observed: Observed) -> None:
    observed.engine.submit(work(1, [0, 1] * 5, 7))
    observed.engine.submit(work(2, [1] * 5, 9, n=2))
    observed.run()
    finishes = [delta.finish for delta in observed.engine.drain_outputs() if delta.finish is not None]
    assert observed.value(names.GENERATED_TOKENS) == 7 + 2 * 9 == sum(finish.num_tokens for finish in finishes)
    assert observed.value(names.PROMPT_TOKENS) == 10 + 2 * 5


def test_time_of_steps_is_told_by_its_parts(observed: Observed) -> None:
    exercise(observed)
    (whole,) = observed.points(names.STEP_DURATION)
    parts = {p: observed.value(names.STEP_PHASE_SECONDS, **{Attribute.STEP_PHASE: p}) for p in PHASES}
    assert min(parts.values()) >= 0
    assert parts["sample"] == 0, "neither runner tells drawing apart"
    assert sum(parts.values()) == pytest.approx(whole.sum)
    assert tuple(whole.explicit_bounds) == names.STEP_DURATION.buckets


PHASES = ("schedule", "run", "sample", "emit")


def test_an_aborted_sequence_counts_what_it_generated(observed: Observed) -> None:
    observed.engine.submit(work(1, [1], 30))
    for _ in range(3):
        observed.step()
    observed.engine.abort(WorkId("r", 1))
    (finish,) = [delta.finish for delta in observed.engine.drain_outputs() if delta.finish is not None]
    assert observed.value(names.GENERATED_TOKENS) == finish.num_tokens >= 3


def test_without_an_sdk_nothing_is_asked_of_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where neither spans nor metrics are wanted: the engine is not even watched."""
    monkeypatch.setattr("workers.step_telemetry.recording_meter", lambda _scope: None)
    monkeypatch.setattr("workers.step_telemetry.records", lambda: False)
    engine = FakeEngine()
    assert observe(engine, "one") is None
    assert engine._watch is None
    monkeypatch.setattr("workers.step_telemetry.records", lambda: True)
    assert observe(engine, "one") is not None
    assert engine._watch is not None


@pytest.mark.parametrize("is_counted", [False, True], ids=["plain", "counted"])
def test_an_engine_that_cannot_be_watched_has_the_metrics_of_what_it_says(
    monkeypatch: pytest.MonkeyPatch, is_counted: bool
) -> None:
    class Plain:
        """An engine's seam and no more."""

        def __init__(self) -> None:
            self.info, self.load = FakeEngine().info, FakeEngine().load

    class Counting(Plain):
        """As vLLM, which takes its steps elsewhere."""

        counts = staticmethod(FakeEngine().counts)

    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], shutdown_on_exit=False).get_meter("test")
    monkeypatch.setattr("workers.step_telemetry.recording_meter", lambda _scope: meter)
    assert observe(Counting() if is_counted else Plain(), "one") is None  # type: ignore[arg-type]
    data = reader.get_metrics_data()
    assert data is not None
    told = {m.name for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics}
    assert {names.ENGINE_RUNNING.name, names.KV_BLOCKS.name, names.STEPS.name} <= told
    assert (names.GENERATED_TOKENS.name in told) == is_counted
