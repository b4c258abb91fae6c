"""Finds spans among those of an in-memory exporter."""

from __future__ import annotations

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def one(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = named(exporter, name)
    return span


def attributes(span: ReadableSpan) -> dict[str, object]:
    return dict(span.attributes or {})


def number(span: ReadableSpan, attribute: str) -> float:
    return float(str(attributes(span)[attribute]))


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def links(span: ReadableSpan) -> list[int]:
    """Return the ids of the spans that it is linked to."""
    return [link.context.span_id for link in span.links]


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


def assert_child_of(span: ReadableSpan, parent: int) -> None:
    assert span.parent is not None
    assert span.parent.span_id == parent
    assert format(span.context.trace_id, "032x") == TRACE  # type: ignore[union-attr]
