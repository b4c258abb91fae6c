"""Spans on their way out: bounded, counted, and nobody waits for a collector."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Link, SpanContext

from cluster.telemetry_spans import QueueLimits, SpanQueue
from workers.errors import ConfigError


class Exporter(SpanExporter):
    """Takes spans when told to, and says what it is told to say."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.came = threading.Event()
        self.names: list[list[str]] = []
        self.results: list[SpanExportResult | Exception] = []
        self.is_shut = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.came.set()
        assert self.may_go.wait(10)
        self.names.append([span.name for span in spans])
        result = self.results.pop(0) if self.results else SpanExportResult.SUCCESS
        if isinstance(result, Exception):
            raise result
        return result

    def shutdown(self) -> None:
        self.is_shut = True


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter()
    yield exporter
    exporter.may_go.set()


def make(exporter: Exporter, limits: QueueLimits) -> tuple[SpanQueue, TracerProvider]:
    provider = TracerProvider(shutdown_on_exit=False)
    queue = SpanQueue(exporter, limits)
    provider.add_span_processor(queue)
    return queue, provider


def end_spans(provider: TracerProvider, *names: str) -> None:
    for name in names:
        provider.get_tracer("test").start_span(name).end()


def test_spans_leave_in_batches_and_in_order(exporter: Exporter) -> None:
    exporter.may_go.set()
    queue, provider = make(exporter, QueueLimits(max_spans=8, max_batch=3, delay_s=60))
    end_spans(provider, *"abcd")
    assert queue.force_flush(10_000)
    assert [name for batch in exporter.names for name in batch] == [*"abcd"]
    assert max(map(len, exporter.names)) <= 3
    end_spans(provider, "e")
    provider.shutdown()
    assert exporter.names[-1] == ["e"]
    assert exporter.is_shut
    assert queue.num_dropped == 0
    end_spans(provider, "late")
    assert queue.num_dropped == 1


def test_a_full_batch_leaves_at_once_and_others_after_the_delay(exporter: Exporter) -> None:
    exporter.may_go.set()
    _, provider = make(exporter, QueueLimits(max_spans=8, max_batch=2, delay_s=60))
    end_spans(provider, *"ab")
    assert exporter.came.wait(10)
    other = Exporter()
    other.may_go.set()
    _, provider = make(other, QueueLimits(max_spans=8, max_batch=2, delay_s=0.01))
    end_spans(provider, "a")
    assert other.came.wait(10)


def test_what_does_not_fit_is_dropped_and_counted(exporter: Exporter) -> None:
    """The collector hangs with one batch in its hands: what ends meanwhile neither waits nor grows the queue."""
    queue, provider = make(exporter, QueueLimits(max_spans=4, max_batch=2, delay_s=60))
    end_spans(provider, *"ab")
    assert exporter.came.wait(10)
    end_spans(provider, *"cdefghij")
    assert queue.num_dropped == 4
    assert not queue.force_flush(10)
    exporter.may_go.set()
    assert queue.force_flush(10_000)
    assert exporter.names == [["a", "b"], ["c", "d"], ["e", "f"]]


def test_links_take_room_as_well(exporter: Exporter) -> None:
    """A queue of steps that are linked to hundreds of requests would take hundreds of megabytes."""
    queue, provider = make(exporter, QueueLimits(max_spans=12, max_batch=4, delay_s=60))
    tracer, link = provider.get_tracer("test"), Link(SpanContext(1, 1, is_remote=True))

    def end_linked(name: str, num_links: int) -> None:
        tracer.start_span(name, links=[link] * num_links).end()

    end_linked("more than a batch", 100)
    assert exporter.came.wait(10)
    end_linked("5", 20)
    end_linked("7", 30)
    end_linked("does not fit", 0)
    assert queue.num_dropped == 1
    exporter.may_go.set()
    assert queue.force_flush(10_000)
    assert exporter.names == [["more than a batch"], ["5"], ["7"]]
    end_linked("larger than the queue", 100)
    assert queue.force_flush(10_000)
    assert exporter.names[-1] == ["larger than the queue"]


def test_what_the_exporter_does_not_get_rid_of_is_counted(exporter: Exporter) -> None:
    exporter.may_go.set()
    exporter.results = [SpanExportResult.FAILURE, ValueError("a bug")]
    queue, provider = make(exporter, QueueLimits(max_spans=8, max_batch=2, delay_s=60))
    for names in ("ab", "c", "d"):
        end_spans(provider, *names)
        assert queue.force_flush(10_000)
    assert queue.num_dropped == 3
    assert exporter.names[-1] == ["d"]


def test_spans_that_are_not_kept_do_not_count(exporter: Exporter) -> None:
    queue = SpanQueue(exporter, QueueLimits(max_spans=1, max_batch=1))
    provider = TracerProvider(ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(queue)
    end_spans(provider, *"abc")
    assert queue.num_dropped == 0


def test_limits_are_those_of_the_specification() -> None:
    assert QueueLimits.of({}) == QueueLimits(max_spans=4096, max_batch=512, delay_s=5.0)
    variables = {"OTEL_BSP_MAX_QUEUE_SIZE": "100", "OTEL_BSP_SCHEDULE_DELAY": "200"}
    assert QueueLimits.of(variables) == QueueLimits(max_spans=100, max_batch=100, delay_s=0.2)
    for text in ("0", "-1", "many"):
        with pytest.raises(ConfigError, match=f"OTEL_BSP_MAX_QUEUE_SIZE must be an integer >= 1, is '{text}'"):
            QueueLimits.of({"OTEL_BSP_MAX_QUEUE_SIZE": text})
