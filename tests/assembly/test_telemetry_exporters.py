"""Exporters to a collector: what becomes of a batch that it does not take, and when they speak of it."""

from __future__ import annotations

import gc
import logging
import socket
import weakref
from collections.abc import Iterator

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from cluster.telemetry_exporters import MetricSender, SpanSender
from cluster.telemetry_spans import QueueLimits, SpanQueue
from tests.collector import Collector


@pytest.fixture
def no_search_for_garbage() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A collector that accepts connections and says nothing, given up after a moment."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.2")
        yield


class Seen(SpanProcessor):
    """Whether spans are still there, of those that have ended."""

    def __init__(self) -> None:
        self.spans: list[weakref.ref[ReadableSpan]] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(weakref.ref(span))


def export_one(provider: TracerProvider, queue: SpanQueue) -> None:
    provider.get_tracer("test").start_span("any").end()
    queue.force_flush(10_000)


@pytest.mark.usefixtures("no_search_for_garbage", "silent")
def test_a_batch_that_is_not_taken_is_gone_without_a_search_for_garbage(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK's exporter leaves a cycle with the batch for each failure; a router looks for those every few minutes."""
    queue = SpanQueue(SpanSender(), QueueLimits(delay_s=60))
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(queue)
    provider.add_span_processor(seen := Seen())
    for _ in range(2):
        export_one(provider, queue)
    assert queue.num_dropped == 2
    assert [span() for span in seen.spans] == [None, None]
    assert ["do not reach" in record.message for record in caplog.records] == [True]
    provider.shutdown()


@pytest.mark.usefixtures("silent")
def test_metrics_that_are_not_taken_are_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = PeriodicExportingMetricReader(MetricSender(), export_interval_millis=60_000)
    provider = MeterProvider([reader], shutdown_on_exit=False)
    provider.get_meter("test").create_counter("any").add(1)
    for _ in range(2):
        reader.collect()
    assert [record.message.split()[0] for record in caplog.records] == ["metrics"]
    provider.shutdown()


def test_what_is_taken_again_is_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with Collector() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        queue = SpanQueue(sender := SpanSender(), QueueLimits(delay_s=60))
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(queue)
        export_one(provider, queue)
        assert caplog.records == []
        sender._is_away = True
        export_one(provider, queue)
        assert "traces reach" in caplog.records[0].message
        assert len(collector.named("any")) == 2
        provider.shutdown()
    assert queue.num_dropped == 0
