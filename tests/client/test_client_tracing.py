"""The client's span, and the W3C context that travels with each request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack

import pytest
from octavo.client import Client, InvalidArgumentError, tracing
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from router import span as router_span
from tests.client.cuttable_proxy import cuttable_proxy
from tests.client.scripted_router import ScriptedRouter, pb
from tests.client.waiting import until
from tests.router.rig import answering, running

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


async def test_an_answer_over_two_routers_is_one_trace(
    make_client: Callable[..., Client], spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The router that has begun it is gone: the other one's server span is below the same span of the client."""
    monkeypatch.setattr(router_span, "_tracer", tracing.trace.get_tracer("router"))
    received: list[str] = []

    async def ask(*addresses: str) -> None:
        async with make_client(*addresses) as client:
            async for delta in client.generate("p"):
                received.append(delta.text)

    async with running(router_id="one") as one, running(router_id="two") as two, AsyncExitStack() as end:
        networks = [await end.enter_async_context(AsyncExitStack()) for _ in range(2)]
        one_way, other_way = [
            await network.enter_async_context(cuttable_proxy(rig.address))
            for network, rig in zip(networks, (one, two), strict=True)
        ]
        asking = asyncio.create_task(ask(one_way.address, other_way.address))
        await until(lambda: one.backend.works or two.backend.works)
        begun, other, network = (one, two, networks[0]) if one.backend.works else (two, one, networks[1])
        begun.backend.works[0].dispatch()
        begun.backend.works[0].emit("ab")
        await until(lambda: received)
        other.backend.script = answering("cd")
        await network.aclose()
        await asking
    assert "".join(received) == "abcd"
    found = spans.get_finished_spans()
    (asked,) = [span for span in found if span.kind is SpanKind.CLIENT]
    servers = [span for span in found if span.kind is SpanKind.SERVER]
    assert sorted(str((span.attributes or {})["octavo.router.id"]) for span in servers) == ["one", "two"]
    assert asked.context is not None
    assert {span.parent.span_id for span in servers if span.parent} == {asked.context.span_id}
    assert {span.context.trace_id for span in found if span.context} == {asked.context.trace_id}


async def test_without_opentelemetry_the_given_context_passes_through(
    client: Client, router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracing, "HAS_OPENTELEMETRY", False)
    given = await client.complete("p", traceparent=TRACEPARENT, tracestate="k=v")
    none = await client.complete("p")
    assert [start.traceparent for start in router.starts] == [TRACEPARENT, ""]
    assert [start.tracestate for start in router.starts] == ["k=v", ""]
    assert (given.trace_id, none.trace_id) == (TRACE_ID, "")
