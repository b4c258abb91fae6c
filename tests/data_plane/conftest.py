"""What tests of the back's spans share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """A provider of this test's own: the process has one for good, which other tests may want."""
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    monkeypatch.setattr("router.dispatch_spans._TRACER", provider.get_tracer("router"))
    monkeypatch.setattr("workers.work_spans._TRACER", provider.get_tracer("workers"))
    monkeypatch.setattr("workers.step_telemetry._TRACER", provider.get_tracer("workers"))
    yield memory
    provider.shutdown()
