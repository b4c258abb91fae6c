"""The server span of a request and what the front puts below it: parents, attributes, status, errors once, times."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import grpc
import pytest
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2
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


async def server_span(exporter: InMemorySpanExporter) -> ReadableSpan:
    """Return the one span that is not below another one of the router; it is the last to end."""
    await eventually(lambda: any(span.kind is SpanKind.SERVER for span in exporter.get_finished_spans()))
    *below, span = exporter.get_finished_spans()
    assert {child.kind for child in below} == {SpanKind.INTERNAL}
    assert {id_of(child) for child in below} == {id_of(span)}
    return span


def id_of(span: ReadableSpan) -> int:
    """Return the id of a server span, and that of the parent of any other."""
    context = span.context if span.kind is SpanKind.SERVER else span.parent
    assert context is not None
    return context.span_id


def child(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    (span,) = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def seconds(span: ReadableSpan) -> float:
    assert span.start_time is not None
    assert span.end_time is not None
    return (span.end_time - span.start_time) / 1e9


async def test_a_request_s_span(rig: Rig, way: str, exporter: InMemorySpanExporter) -> None:
    rig.backend.script = answering("abc")
    await traced(rig, way, text_request("hello", max_tokens=9, priority=2, client_request_id="s"))
    span = await server_span(exporter)
    attributes = dict(span.attributes or {})
    assert 0 < float(str(attributes.pop("gen_ai.response.time_to_first_chunk"))) <= seconds(span)
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}-{span.parent.span_id:016x}" == f"{TRACE_ID}-{PARENT_ID}"
    assert span.kind is SpanKind.SERVER
    suffix = "Generate" if way == "generate" else "Session request"
    assert span.name == f"octavo.v1.InferenceService/{suffix}"
    assert attributes == {
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
    span = await server_span(exporter)
    attributes = span.attributes or {}
    assert [event.name for event in span.events] == ["exception"]
    if is_ours:
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "replica lost")
        assert (attributes["rpc.grpc.status_code"], attributes["error.type"]) == (14, "NO_REPLICA")
    else:
        assert span.status.status_code is StatusCode.UNSET
        assert (attributes["rpc.grpc.status_code"], attributes["error.type"]) == (3, "INVALID_FIELD")


async def test_what_the_front_takes_before_and_after_is_told(
    rig: Rig, way: str, exporter: InMemorySpanExporter
) -> None:
    rig.backend.script = answering("abc")
    await traced(rig, way, text_request("hello", client_request_id="s"))
    span = await server_span(exporter)
    accept, deliver = child(exporter, "octavo.accept"), child(exporter, "octavo.deliver")
    assert dict(accept.attributes or {}) == {"octavo.request.id": "s", "gen_ai.usage.input_tokens": 5}
    assert dict(deliver.attributes or {}) == {"octavo.request.id": "s"}
    assert span.start_time == accept.start_time
    assert accept.end_time <= deliver.start_time <= deliver.end_time <= span.end_time  # type: ignore[operator]


async def test_a_client_that_reads_late_is_seen_to(rig: Rig, exporter: InMemorySpanExporter) -> None:
    """The answer is there at once, and taken when there is a window for it."""
    rig.backend.script = answering("abcdefgh")
    async with rig.open_session() as session:
        await session.start("s", text_request("hello"), traceparent=TRACEPARENT, window=1)
        await session.text("s", "a")
        await asyncio.sleep(0.1)
        await session.grant("s", 100)
        await session.outcome("s")
    await server_span(exporter)
    assert seconds(child(exporter, "octavo.deliver")) >= 0.1


async def test_what_is_refused_has_been_looked_at(rig: Rig, way: str, exporter: InMemorySpanExporter) -> None:
    await traced(rig, way, text_request(max_tokens=-1))
    span = await server_span(exporter)
    accept = child(exporter, "octavo.accept")
    assert (accept.attributes or {})["error.type"] == "INVALID_FIELD"
    assert accept.events == (), "the server span has the exception"
    assert span.start_time == accept.start_time
    assert seconds(span) - seconds(accept) < 0.05
    assert len(exporter.get_finished_spans()) == 2


async def test_a_request_that_is_attached_again_stays_one_span(rig: Rig, exporter: InMemorySpanExporter) -> None:
    async with rig.open_session() as old, rig.open_session() as new:
        await old.start("a", text_request(), traceparent=TRACEPARENT)
        work = await rig.backend.work()
        work.emit("ab")
        await old.text("a", "ab")
        await new.attach("a", b"a")
        work.finish()
        await new.outcome("a")
        span = await server_span(exporter)
    assert (span.attributes or {})["gen_ai.usage.output_tokens"] == 2
    assert [s.kind for s in exporter.get_finished_spans()].count(SpanKind.SERVER) == 1


async def test_a_retry_after_a_router_s_death_is_another_span_of_the_same_trace(
    rig: Rig, way: str, exporter: InMemorySpanExporter
) -> None:
    """What a client does when its router dies: it goes on at another one, in the context that it had."""
    rig.backend.script = answering("abc")
    await traced(rig, way, text_request("hello"))
    await traced(rig, way, text_request("hello", received_token_ids=[types_pb2.TokenIds(ids=b"xy")]))
    await eventually(lambda: sum(s.kind is SpanKind.SERVER for s in exporter.get_finished_spans()) == 2)
    servers = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert {f"{span.context.trace_id:032x}" for span in servers if span.context} == {TRACE_ID}
    assert {f"{span.parent.span_id:016x}" for span in servers if span.parent} == {PARENT_ID}
    assert [(span.attributes or {})["gen_ai.usage.output_tokens"] for span in servers] == [3, 5]


async def test_a_client_that_leaves(rig: Rig, exporter: InMemorySpanExporter) -> None:
    call = rig.stub.Generate(text_request(), timeout=10)
    await rig.backend.work()
    call.cancel()
    span = await server_span(exporter)
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
    assert (await server_span(exporter)).parent is None


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
