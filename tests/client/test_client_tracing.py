"""The client's span, and the W3C context that travels with each request."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from octavo.client import Client, InvalidArgumentError, tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from tests.client.scripted_router import ScriptedRouter, pb

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """The process has one global provider, which is not ours to set: hand the client a tracer of our own."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing.trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


async def test_a_request_is_a_span_whose_context_reaches_the_router(
    client: Client, router: ScriptedRouter, spans: InMemorySpanExporter
) -> None:
    answer = await client.complete("p", max_tokens=4, temperature=0.0, request_id="mine")
    [span] = spans.get_finished_spans()
    assert span.context is not None
    assert span.kind is SpanKind.CLIENT
    assert answer.trace_id == f"{span.context.trace_id:032x}"
    assert router.starts[0].traceparent.startswith(f"00-{answer.trace_id}-{span.context.span_id:016x}-")
    assert span.attributes is not None
    assert span.attributes["octavo.request.id"] == "mine"
    assert span.attributes["gen_ai.usage.output_tokens"] == 4
    assert span.attributes["gen_ai.request.max_tokens"] == 4
    assert span.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert span.attributes["rpc.grpc.status_code"] == 0
    assert span.status.is_ok or span.status.is_unset


async def test_a_given_traceparent_is_the_parent(
    client: Client, router: ScriptedRouter, spans: InMemorySpanExporter
) -> None:
    answer = await client.complete("p", traceparent=TRACEPARENT, tracestate="k=v")
    [span] = spans.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert answer.trace_id == TRACE_ID
    assert router.starts[0].tracestate == "k=v"


async def test_retries_and_errors_are_on_the_span(
    client: Client, router: ScriptedRouter, spans: InMemorySpanExporter
) -> None:
    router.refusals = [pb.Terminal(code=14, reason="NO_REPLICA"), pb.Terminal(code=3, reason="EMPTY_PROMPT")]
    with pytest.raises(InvalidArgumentError):
        await client.complete("")
    [span] = spans.get_finished_spans()
    assert [event.name for event in span.events] == ["turned away"]
    assert span.attributes is not None
    assert span.attributes["error.type"] == "EMPTY_PROMPT"
    assert not span.status.is_ok
    assert {start.traceparent for start in router.starts} == {router.starts[0].traceparent}


async def test_without_opentelemetry_the_given_context_passes_through(
    client: Client, router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "HAS_OPENTELEMETRY", False)
    given = await client.complete("p", traceparent=TRACEPARENT, tracestate="k=v")
    none = await client.complete("p")
    assert [start.traceparent for start in router.starts] == [TRACEPARENT, ""]
    assert [start.tracestate for start in router.starts] == ["k=v", ""]
    assert (given.trace_id, none.trace_id) == (TRACE_ID, "")
