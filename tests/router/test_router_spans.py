"""The server span of a request: parent, attributes, status, errors once; and that its own context goes on."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from octavo.v1 import inference_service_pb2 as pb
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router import span as router_span
from router.validation import Envelope
from tests.router.rig import Outcome, Rig, answering, eventually, text_request
from workers.errors import UnavailableError

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(router_span, "_tracer", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


async def traced(rig: Rig, way: str, request: pb.GenerateRequest) -> Outcome:
    if way == "generate":
        return await rig.generate(request, metadata=(("traceparent", TRACEPARENT), ("tracestate", "a=b")))
    return await rig.session(request, traceparent=TRACEPARENT, tracestate="a=b")


async def only_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    await eventually(lambda: len(exporter.get_finished_spans()) > 0)
    (span,) = exporter.get_finished_spans()
    return span


async def test_a_request_s_span(rig: Rig, way: str, exporter: InMemorySpanExporter) -> None:
    rig.backend.script = answering("abc")
    await traced(rig, way, text_request("hello", max_tokens=9, priority=2, client_request_id="s"))
    span = await only_span(exporter)
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == f"{TRACE_ID}-{PARENT_ID}"
    assert span.kind is SpanKind.SERVER
    suffix = "Generate" if way == "generate" else "Session request"
    assert span.name == f"octavo.v1.InferenceService/{suffix}"
    assert dict(span.attributes or {}) == {
        "rpc.system": "grpc",
        "rpc.service": "octavo.v1.InferenceService",
        "rpc.method": suffix.partition(" ")[0],
        "rpc.grpc.status_code": 0,
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "toy",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 1.0,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 1,
        "gen_ai.response.finish_reasons": ("length",),
        "octavo.request.id": "s",
        "octavo.request.priority": 2,
        "octavo.request.attempt": 1,
        "octavo.router.id": "router-1",
        "octavo.replica.id": "r1",
    }
    assert span.status.status_code is StatusCode.UNSET
    assert span.events == ()
    request = rig.backend.works[0].request
    assert span.context is not None
    assert request.traceparent == f"00-{TRACE_ID}-{span.context.span_id:016x}-01"
    assert request.tracestate == "a=b"


@pytest.mark.parametrize("is_ours", [True, False])
async def test_an_error_is_recorded_once(rig: Rig, way: str, exporter: InMemorySpanExporter, *, is_ours: bool) -> None:
    rig.backend.script = lambda work: work.end(UnavailableError("replica lost"))
    await traced(rig, way, text_request(max_tokens=None if is_ours else -1))
    span = await only_span(exporter)
    attributes = span.attributes or {}
    assert [event.name for event in span.events] == ["exception"]
    if is_ours:
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "replica lost")
        assert (attributes["rpc.grpc.status_code"], attributes["error.type"]) == (14, "NO_REPLICA")
    else:
        assert span.status.status_code is StatusCode.UNSET
        assert (attributes["rpc.grpc.status_code"], attributes["error.type"]) == (3, "INVALID_FIELD")


async def test_a_client_that_leaves(rig: Rig, exporter: InMemorySpanExporter) -> None:
    call = rig.stub.Generate(text_request(), timeout=10)
    await rig.backend.work()
    call.cancel()
    span = await only_span(exporter)
    assert (span.attributes or {})["rpc.grpc.status_code"] == grpc.StatusCode.CANCELLED.value[0]


async def test_without_an_sdk_the_client_s_context_goes_on(rig: Rig, way: str) -> None:
    rig.backend.script = answering("x")
    await traced(rig, way, text_request())
    await rig.run(way, text_request())
    first, second = (work.request for work in rig.backend.works)
    assert (first.traceparent, first.tracestate) == (TRACEPARENT, "a=b")
    assert (second.traceparent, second.tracestate) == ("", "")


@pytest.mark.parametrize("traceparent", ["rubbish", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "é"])
async def test_a_context_that_is_none_starts_a_trace(
    rig: Rig, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    rig.backend.script = answering("x")
    await rig.session(text_request(), traceparent=traceparent)
    assert (await only_span(exporter)).parent is None


@pytest.mark.parametrize(
    "traceparent",
    [
        f"00-{TRACE_ID}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID}-00f067aa0ba902b7-00",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"01-{TRACE_ID}-00f067aa0ba902b7-01-more",
        f"ff-{TRACE_ID}-00f067aa0ba902b7-01",
        f"00-{TRACE_ID.upper()}-00f067aa0ba902b7-01",
        "rubbish",
    ],
)
def test_a_context_is_read_as_the_library_reads_it(traceparent: str) -> None:
    """Plain ones are read by our own code, which costs less."""
    envelope = Envelope(request_id="r", accepted_at=0.0, deadline=1.0, traceparent=traceparent)
    theirs = TraceContextTextMapPropagator().extract({"traceparent": traceparent})
    ours = trace.get_current_span(router_span._parent(envelope)).get_span_context()
    assert ours == trace.get_current_span(theirs).get_span_context()
