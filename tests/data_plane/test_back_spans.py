"""The part of a request's trace that router back and replica make, read from an in-memory exporter."""

from __future__ import annotations

import json

import pytest
from octavo.names import Attribute, Event, Reason
from opentelemetry import trace
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.data_plane.rig import RecordingSink, Replica, make_dispatcher, make_request, until
from tests.data_plane.spans import PARENT, SAMPLED, UNSAMPLED, assert_child_of, attributes, links, named, one, span_id
from workers.types import Work
from workers.work_spans import WorkSpans


async def test_one_request_is_one_tree_across_router_and_replica(exporter: InMemorySpanExporter) -> None:
    replica = await Replica("one", fake_step_s=0.002).start()
    dispatcher = make_dispatcher()
    dispatcher.start()
    sink = RecordingSink()
    request = make_request(range(40), 10, traceparent=SAMPLED, tracestate="vendor=1", priority=3)
    dispatcher.submit(request, sink)
    dispatcher.update_replicas([replica.address])
    await sink.wait()
    await dispatcher.stop()
    await replica.stop()

    queue, dispatch = one(exporter, "octavo.queue"), one(exporter, "octavo.dispatch")
    prefill, decode = one(exporter, "octavo.prefill"), one(exporter, "octavo.decode")
    wait, batch = one(exporter, "octavo.engine.queue"), one(exporter, "octavo.batch")
    assert_child_of(queue, int(PARENT, 16))
    assert_child_of(dispatch, int(PARENT, 16))
    assert_child_of(prefill, dispatch.context.span_id)  # type: ignore[union-attr]
    assert_child_of(decode, dispatch.context.span_id)  # type: ignore[union-attr]
    assert_child_of(wait, span_id(dispatch))
    assert batch.parent is None
    assert links(batch) == [span_id(dispatch)]
    assert attributes(batch) == {
        Attribute.BATCH_ID: attributes(dispatch)[Attribute.BATCH_ID],
        Attribute.ROUTER: "router-1",
        Attribute.BATCH_REQUESTS: 1,
        Attribute.BATCH_TOKENS: 40,
    }
    assert dispatch.context.trace_state.get("vendor") == "1"  # type: ignore[union-attr]

    assert attributes(queue)[Attribute.PRIORITY] == 3
    decision = attributes(dispatch)
    assert decision[Attribute.REPLICA] == "one"
    assert decision[Attribute.RULE] == "only"
    assert decision[Attribute.ATTEMPT] == 1
    (candidate,) = json.loads(str(decision[Attribute.CANDIDATES]))
    terms = {"owed": 0, "uncached": 40, "decode": 0, "displaced": 0, "recent": 0}
    assert candidate == {"replica": "one", "matched": 0, **terms, "cost": 40}
    assert attributes(prefill)[Attribute.INPUT_TOKENS] == 40
    assert attributes(prefill)[Attribute.CACHED_INPUT_TOKENS] == 0
    assert attributes(decode)[Attribute.OUTPUT_TOKENS] == 10
    assert attributes(decode)[Attribute.NUM_PREEMPTIONS] == 0
    assert attributes(decode)[Attribute.FINISH_REASONS] == ("length",)
    assert sink.finish is not None
    assert sink.finish.num_steps == 10, "the prompt's brings the first token"
    assert {attributes(span)[Attribute.REQUEST_ID] for span in (queue, dispatch, prefill, decode)} == {
        request.request_id
    }

    assert queue.end_time <= dispatch.start_time <= prefill.start_time  # type: ignore[operator]
    assert dispatch.start_time <= wait.start_time <= wait.end_time == prefill.start_time  # type: ignore[operator]
    assert prefill.end_time == decode.start_time
    assert decode.end_time - decode.start_time >= 9 * 2_000_000  # type: ignore[operator]
    assert decode.end_time <= dispatch.end_time  # type: ignore[operator]


@pytest.mark.parametrize("traceparent", ["", UNSAMPLED, "nonsense"])
async def test_what_is_not_sampled_makes_no_spans(exporter: InMemorySpanExporter, traceparent: str) -> None:
    replica = await Replica("one").start()
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    sink = RecordingSink()
    dispatcher.submit(make_request(range(40), traceparent=traceparent), sink)
    await sink.wait()
    await dispatcher.stop()
    await replica.stop()
    assert exporter.get_finished_spans() == ()


async def test_without_an_sdk_a_sampled_request_costs_no_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's context goes on to the replica as it came."""
    monkeypatch.setattr("router.dispatch_spans._TRACER", trace.NoOpTracer())
    monkeypatch.setattr("workers.work_spans._TRACER", trace.ProxyTracer("none"))
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    replica = await Replica("one").start()
    dispatcher = make_dispatcher()
    dispatcher.start()
    sink = RecordingSink()
    dispatcher.submit(make_request(range(40), traceparent=SAMPLED), sink)
    (flight,) = dispatcher._flights
    assert flight.spans is None
    submitted: list[Work] = []
    submit = replica.thread.submit
    replica.thread.submit = lambda work: (submitted.append(work), submit(work))[1]  # type: ignore[method-assign, func-returns-value]
    dispatcher.update_replicas([replica.address])
    await sink.wait()
    await dispatcher.stop()
    await replica.stop()
    assert [work.traceparent for work in submitted] == [SAMPLED]
    assert WorkSpans.begin(submitted[0], "one", 0.0) is None


async def test_a_lost_attempt_is_told_and_the_next_one_too(exporter: InMemorySpanExporter) -> None:
    first, second = await Replica("first", fake_step_s=0.1).start(), await Replica("second").start()
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([first.address])
    sink = RecordingSink()
    dispatcher.submit(make_request(range(40), traceparent=SAMPLED), sink)
    await until(lambda: bool(sink.decisions))
    await first.kill()
    dispatcher.update_replicas([second.address])
    await sink.wait()
    await dispatcher.stop()
    await second.stop()
    lost, good = named(exporter, "octavo.dispatch")
    assert attributes(lost)[Attribute.ERROR_TYPE] == Reason.REPLICA_LOST
    assert lost.status.status_code is StatusCode.ERROR
    assert attributes(good)[Attribute.ATTEMPT] == 2
    assert good.status.status_code is StatusCode.UNSET
    assert (links(lost), links(good)) == ([], [span_id(lost)])
    first_wait, second_wait = named(exporter, "octavo.queue")
    assert not first_wait.events
    (resumed,) = second_wait.events
    assert resumed.name == Event.RESUMED
    num_received = int(str((resumed.attributes or {})[Attribute.RECEIVED_TOKENS]))
    assert resumed.attributes == {Attribute.ERROR_TYPE: Reason.REPLICA_LOST, Attribute.RECEIVED_TOKENS: num_received}
    told = attributes(named(exporter, "octavo.prefill")[-1]).get(Attribute.RECEIVED_TOKENS, 0)
    assert told == num_received


async def test_a_request_that_ends_in_the_queue_says_why(exporter: InMemorySpanExporter) -> None:
    dispatcher = make_dispatcher()
    dispatcher.start()
    sink = RecordingSink()
    dispatcher.submit(make_request(range(40), traceparent=SAMPLED, timeout_s=0.02), sink)
    await sink.wait()
    await dispatcher.stop()
    (span,) = exporter.get_finished_spans()
    assert span.name == "octavo.queue"
    assert attributes(span)[Attribute.ERROR_TYPE] == Reason.DEADLINE_PASSED


async def test_a_cancelled_request_shows_what_its_replica_did(exporter: InMemorySpanExporter) -> None:
    replica = await Replica("one", fake_step_s=0.002).start()
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    sink = RecordingSink()
    cancel = dispatcher.submit(make_request(range(40), 500, traceparent=SAMPLED), sink)
    await until(lambda: len(sink.token_ids) > 2)
    cancel()
    await until(lambda: replica.server.num_works == 0)
    await dispatcher.stop()
    await replica.stop()
    dispatch = one(exporter, "octavo.dispatch")
    assert attributes(dispatch)[Attribute.ERROR_TYPE] == Reason.CANCELLED
    assert dispatch.status.status_code is StatusCode.UNSET, "an answer that ends with a stop string is cancelled, too"
    decode = attributes(one(exporter, "octavo.decode"))
    assert decode[Attribute.ERROR_TYPE] == "cancelled"
    assert int(str(decode[Attribute.OUTPUT_TOKENS])) >= len(sink.token_ids)
