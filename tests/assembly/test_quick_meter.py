"""Counters and histograms that add up themselves say what the SDK's say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from octavo.metrics import bound, recording_meter
from opentelemetry import metrics as api
from opentelemetry.metrics import Meter, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Metric

from cluster import telemetry_meter
from cluster.telemetry_meter import Histograms, QuickMeterProvider, collecting

A, B = {"model": "a", "kind": "x"}, {"model": "b"}


class Collected:
    """A meter and what its reader finds."""

    def __init__(self, *, is_quick: bool) -> None:
        histograms = Histograms()
        self.reader = (collecting(InMemoryMetricReader, histograms) if is_quick else InMemoryMetricReader)()
        provider = MeterProvider([self.reader], shutdown_on_exit=False)
        own = QuickMeterProvider(provider, histograms) if is_quick else provider
        self.meter: Meter = own.get_meter("scope")
        self.meter_again: Callable[[], Meter] = lambda: own.get_meter("scope")

    def metrics(self) -> dict[str, Metric]:
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        assert len({scope.scope for scope in scopes}) == len(scopes)
        assert {scope.scope.name for scope in scopes} == {"scope"}
        return {metric.name: metric for scope in scopes for metric in scope.metrics}

    def points(self, name: str) -> dict[tuple[Any, ...], Any]:
        found = self.metrics()[name].data.data_points
        return {tuple(sorted((point.attributes or {}).items())): point for point in found}


@pytest.fixture(params=[True, False], ids=["quick", "sdk"])
def collected(request: pytest.FixtureRequest) -> Collected:
    return Collected(is_quick=request.param)


def test_a_counter_adds_up_for_each_set_of_attributes(collected: Collected) -> None:
    counter = collected.meter.create_counter("requests", "{request}", "How many")
    counter.add(1, A)
    counter.add(2, dict(reversed(A.items())))
    counter.add(5, B)
    counter.add(7)
    points = collected.points("requests")
    assert {key: point.value for key, point in points.items()} == {
        (("kind", "x"), ("model", "a")): 3,
        (("model", "b"),): 5,
        (): 7,
    }
    metric = collected.metrics()["requests"]
    assert (metric.unit, metric.description) == ("{request}", "How many")
    assert metric.data.is_monotonic  # type: ignore[union-attr]
    counter.add(1, B)
    assert collected.points("requests")[("model", "b"),].value == 6


def test_a_histogram_has_its_buckets_with_inclusive_upper_bounds(collected: Collected) -> None:
    collected.meter.create_counter("other").add(1)
    histogram = collected.meter.create_histogram("wait", "s", "How long", explicit_bucket_boundaries_advisory=[1, 2, 4])
    for value in (0.5, 1, 1.5, 4, 4.5, 100):
        histogram.record(value, A)
    histogram.record(3, B)
    points = collected.points("wait")
    found = points[("kind", "x"), ("model", "a")]
    assert tuple(found.bucket_counts) == (2, 1, 1, 2)
    assert (found.count, found.sum, found.min, found.max) == (6, 111.5, 0.5, 100)
    assert tuple(found.explicit_bounds) == (1, 2, 4)
    assert points[("model", "b"),].count == 1
    metric = collected.metrics()["wait"]
    assert (metric.unit, metric.description) == ("s", "How long")


def test_what_the_meter_has_already_is_the_same_instrument(collected: Collected) -> None:
    for _ in range(2):
        if isinstance(collected.meter, telemetry_meter.QuickMeter):
            collected.meter.create_counter("requests").add(1)
            collected.meter.create_histogram("wait").record(1)
    if isinstance(collected.meter, telemetry_meter.QuickMeter):
        assert collected.points("requests")[()].value == 2
        assert collected.points("wait")[()].count == 2


def test_gauges_and_observed_ones_are_the_sdks(collected: Collected) -> None:
    collected.meter.create_observable_gauge("now", [lambda _: [Observation(4, A)]])
    collected.meter.create_observable_counter("ever", [lambda _: [Observation(9)]])
    collected.meter.create_gauge("set").set(2)
    assert collected.points("now").popitem()[1].value == 4
    assert collected.points("ever")[()].value == 9
    assert collected.points("set")[()].value == 2


def test_a_scope_stands_there_once(collected: Collected) -> None:
    """It stood there twice, with histograms and with all else, and of these the encoder for OTLP keeps the last one."""
    collected.meter.create_histogram("time", "s", "How long").record(1.0)
    collected.meter.create_counter("requests").add(1)
    collected.meter_again().create_gauge("target").set(1)
    assert collected.metrics().keys() == {"time", "requests", "target"}


def test_series_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry_meter, "MAX_SERIES", 3)
    collected = Collected(is_quick=True)
    counter, histogram = collected.meter.create_counter("requests"), collected.meter.create_histogram("wait")
    for number in range(10):
        counter.add(1, {"id": number})
        histogram.record(1, {"id": number})
    for name in ("requests", "wait"):
        points = collected.points(name)
        assert len(points) == 4
        assert ("otel.metric.overflow", True) in {key[0] for key in points}
    assert collected.points("requests")[("otel.metric.overflow", True),].value == 7


def test_negative_amounts_do_not_count() -> None:
    collected = Collected(is_quick=True)
    collected.meter.create_counter("requests").add(-1)
    collected.meter.create_histogram("wait").record(-1)
    assert collected.metrics() == {}


def test_without_a_provider_that_records_there_is_no_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert recording_meter("scope") is None
    monkeypatch.setattr(api, "get_meter_provider", api.NoOpMeterProvider)
    assert recording_meter("scope") is None
    provider = QuickMeterProvider(MeterProvider(shutdown_on_exit=False), Histograms())
    monkeypatch.setattr(api, "get_meter_provider", lambda: provider)
    assert isinstance(recording_meter("scope"), telemetry_meter.QuickMeter)


def test_bound_to_its_attributes_an_instrument_writes_the_same_series(collected: Collected) -> None:
    counter = collected.meter.create_counter("requests")
    histogram = collected.meter.create_histogram("wait", explicit_bucket_boundaries_advisory=[1, 2])
    add, record = bound(counter, A), bound(histogram, A)
    add(1)
    counter.add(2, A)
    record(1.5)
    histogram.record(0.5, A)
    (requests,), (wait,) = collected.points("requests").values(), collected.points("wait").values()
    assert requests.value == 3
    assert (wait.count, wait.sum, tuple(wait.bucket_counts), wait.min, wait.max) == (2, 2, (1, 1, 0), 0.5, 1.5)


def test_a_histogram_that_is_bound_and_has_nothing_is_not_told() -> None:
    collected = Collected(is_quick=True)
    bound(collected.meter.create_histogram("wait"), A)
    bound(collected.meter.create_counter("requests"), A)
    assert "wait" not in collected.metrics()
    assert collected.points("requests").popitem()[1].value == 0
