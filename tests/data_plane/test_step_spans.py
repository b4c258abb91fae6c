"""Spans of engine steps and dispatch batches, and what a request's own spans tell of its steps."""

from __future__ import annotations

import asyncio
import secrets
from itertools import pairwise

import pytest
from octavo.names import Attribute, Event, Reason
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from tests.data_plane.rig import RecordingSink, Replica, make_dispatcher, make_request, until
from tests.data_plane.spans import SAMPLED, UNSAMPLED, attributes, links, named, number, one, seconds, span_id
from workers import step_telemetry
from workers.plan import StepPlan
from workers.step_telemetry import LinkBudget
from workers.types import Finish, TokenDelta

LEAST_S = 1e-6
STEP_S = 0.05
"""Of steps whose parts are told apart: much more than a moment in which a thread does not run."""


async def ask(replica: Replica, *requests: tuple[int, int, str], **options: object) -> list[RecordingSink]:
    """Send requests of so many prompt tokens, that generate so many, in a context; return when all are answered."""
    await replica.start(is_traced=True)
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    await until(lambda: any(view.state == "ready" for view in dispatcher.replicas()))
    sinks = [RecordingSink() for _ in requests]
    for sink, (num_prompt, num_tokens, traceparent) in zip(sinks, requests, strict=True):
        prompt = [secrets.randbelow(900) for _ in range(num_prompt)]
        dispatcher.submit(make_request(prompt, num_tokens, traceparent=traceparent, **options), sink)
    await asyncio.gather(*(sink.wait() for sink in sinks))
    await until(lambda: replica.server.num_works == 0)
    await dispatcher.stop()
    await replica.stop()
    return sinks


def context() -> str:
    """A client's, sampled."""
    return f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-01"


def dispatch_of(exporter: InMemorySpanExporter, traceparent: str) -> ReadableSpan:
    (span,) = [s for s in named(exporter, "octavo.dispatch") if f"{s.context.trace_id:032x}" in traceparent]  # type: ignore[union-attr]
    return span


async def test_every_step_and_batch_is_linked_to_all_its_members(exporter: InMemorySpanExporter) -> None:
    contexts = [context() for _ in range(6)]
    await ask(Replica("one"), *((20 + 3 * i, 5 + i, traceparent) for i, traceparent in enumerate(contexts)))
    steps = named(exporter, "octavo.step")
    numbers = [int(number(step, Attribute.STEP)) for step in steps]
    assert numbers == list(range(numbers[0], numbers[0] + len(steps)))
    dispatches = {span_id(dispatch_of(exporter, traceparent)) for traceparent in contexts}
    assert len(dispatches) == 6
    for step in steps:
        assert step.parent is None
        assert len(links(step)) == len(set(links(step))) == number(step, Attribute.STEP_SEQUENCES)
        assert set(links(step)) <= dispatches
    for span in (*named(exporter, "octavo.prefill"), *named(exporter, "octavo.decode")):
        assert span.parent is not None
        first, last = number(span, Attribute.FIRST_STEP), number(span, Attribute.LAST_STEP)
        mine = [step for step in steps if span.parent.span_id in links(step)]
        inside = [number(step, Attribute.STEP) for step in mine if first <= number(step, Attribute.STEP) <= last]
        assert len(inside) == number(span, Attribute.NUM_STEPS)
        assert (inside[0], inside[-1]) == (first, last)
    batches = named(exporter, "octavo.batch")
    assert sum(number(batch, Attribute.BATCH_REQUESTS) for batch in batches) == 6
    for batch in batches:
        assert len(links(batch)) == number(batch, Attribute.BATCH_REQUESTS)
        members = [span for span in named(exporter, "octavo.dispatch") if span_id(span) in links(batch)]
        assert {number(span, Attribute.BATCH_ID) for span in members} == {number(batch, Attribute.BATCH_ID)}
    assert {link for batch in batches for link in links(batch)} == dispatches


async def test_a_step_says_where_its_time_went(exporter: InMemorySpanExporter) -> None:
    await ask(Replica("one", fake_step_s=STEP_S), (40, 6, SAMPLED))
    steps = named(exporter, "octavo.step")
    assert len(steps) == 6
    for step in steps:
        parts = [
            number(step, part)
            for part in (
                Attribute.STEP_SCHEDULE_TIME,
                Attribute.STEP_RUN_TIME,
                Attribute.STEP_SAMPLE_TIME,
                Attribute.STEP_EMIT_TIME,
            )
        ]
        assert min(parts) >= 0
        assert parts[1] >= STEP_S
        assert abs(sum(parts) - number(step, Attribute.STEP_DURATION)) < LEAST_S
        assert abs(seconds(step) - number(step, Attribute.STEP_DURATION)) < LEAST_S
        assert attributes(step)[Attribute.REPLICA] == "one"
    assert [number(step, Attribute.STEP_TOKENS) for step in steps] == [40, 1, 1, 1, 1, 1]
    for one_step, next_step in pairwise(steps):
        assert one_step.end_time <= next_step.start_time  # type: ignore[operator]
    prefill, decode = one(exporter, "octavo.prefill"), one(exporter, "octavo.decode")
    assert abs(steps[0].start_time - prefill.start_time) < 1e6  # type: ignore[operator]
    assert decode.start_time <= steps[0].end_time <= decode.end_time  # type: ignore[operator]


async def test_only_sampled_members_are_linked_and_only_their_steps_have_spans(exporter: InMemorySpanExporter) -> None:
    await ask(Replica("one", fake_step_s=0.001), (20, 400, UNSAMPLED), (20, 400, ""), (20, 4, SAMPLED))
    dispatch = one(exporter, "octavo.dispatch")
    steps = named(exporter, "octavo.step")
    assert 0 < len(steps) <= 5
    assert all(links(step) == [span_id(dispatch)] for step in steps)
    assert max(number(step, Attribute.STEP_SEQUENCES) for step in steps) == 3
    assert all(links(batch) == [span_id(dispatch)] for batch in named(exporter, "octavo.batch"))


async def test_a_step_that_fails_has_a_span_with_its_error(exporter: InMemorySpanExporter) -> None:
    """Linked to all that were in it; the one that is not to blame goes on, and counts it among its steps."""
    replica, contexts = Replica("one", fake_step_s=0.002), [context(), context()]
    launch = replica.engine.runner.launch

    def fail(plan: StepPlan) -> object:
        if any(len(chunk.sequence.work.prompt) == 30 for chunk in plan.chunks):
            raise ArithmeticError
        return launch(plan)

    replica.engine.runner.launch = fail  # type: ignore[assignment, method-assign]
    good, bad = await ask(replica, (20, 200, contexts[0]), (30, 5, contexts[1]))
    assert good.error is None
    assert bad.error is not None
    good_dispatch, bad_dispatch = (span_id(dispatch_of(exporter, each)) for each in contexts)
    steps = named(exporter, "octavo.step")
    (failed,) = [step for step in steps if step.status.status_code is StatusCode.ERROR]
    assert failed.status.description == "ArithmeticError"
    assert attributes(failed)[Attribute.ERROR_TYPE] == Reason.INTERNAL
    assert set(links(failed)) == {good_dispatch, bad_dispatch}
    assert [links(step) for step in steps if step is not failed] == [[good_dispatch]] * 199
    prefill, decode = (
        next(span for span in named(exporter, name) if span.parent and span.parent.span_id == good_dispatch)
        for name in ("octavo.prefill", "octavo.decode")
    )
    assert [number(span, Attribute.NUM_STEPS) for span in (prefill, decode)] == [1, 199]
    errors = [span for span in exporter.get_finished_spans() if Attribute.ERROR_TYPE in attributes(span)]
    assert {span.name for span in errors} == {"octavo.step", "octavo.dispatch", "octavo.prefill"}


async def test_without_a_sampled_request_there_is_no_span(exporter: InMemorySpanExporter) -> None:
    await ask(Replica("one"), (20, 4, UNSAMPLED), (20, 4, ""))
    assert exporter.get_finished_spans() == ()


async def test_choices_of_one_request_are_one_member(exporter: InMemorySpanExporter) -> None:
    await ask(Replica("one"), (20, 6, SAMPLED), n=3)
    dispatch, decode = one(exporter, "octavo.dispatch"), one(exporter, "octavo.decode")
    steps = named(exporter, "octavo.step")
    assert all(links(step) == [span_id(dispatch)] for step in steps)
    assert max(number(step, Attribute.STEP_SEQUENCES) for step in steps) == 3
    assert number(decode, Attribute.OUTPUT_TOKENS) == 18
    prefill = one(exporter, "octavo.prefill")
    assert number(prefill, Attribute.NUM_STEPS) + number(decode, Attribute.NUM_STEPS) == len(steps)


async def test_a_preemption_and_what_was_evicted_are_events(exporter: InMemorySpanExporter) -> None:
    """Two answers that need 40 blocks of 4 tokens each, in a pool of 48."""
    contexts = [context(), context()]
    sinks = await ask(
        Replica("one", num_blocks=48, fake_step_s=0.002), *((8, 152, traceparent) for traceparent in contexts)
    )
    num_preemptions = [sink.finish.num_preemptions for sink in sinks if sink.finish is not None]
    assert sum(num_preemptions) >= 1
    for traceparent, expected in zip(contexts, num_preemptions, strict=True):
        dispatch = span_id(dispatch_of(exporter, traceparent))
        (decode,) = [s for s in named(exporter, "octavo.decode") if s.parent and s.parent.span_id == dispatch]
        told = [event for event in decode.events if event.name in (Event.PREEMPTED, Event.READMITTED)]
        assert [event.name for event in told] == [Event.PREEMPTED, Event.READMITTED] * expected
        assert [event.timestamp for event in decode.events] == sorted(event.timestamp for event in decode.events)
        assert number(decode, Attribute.NUM_PREEMPTIONS) == expected
        mine = [step for step in named(exporter, "octavo.step") if dispatch in links(step)]
        decoding = [s for s in mine if number(s, Attribute.STEP) >= number(decode, Attribute.FIRST_STEP)]
        assert len(decoding) == number(decode, Attribute.NUM_STEPS)
    evicted = [event for step in named(exporter, "octavo.step") for event in step.events]
    assert evicted
    assert {event.name for event in evicted} == {Event.EVICTED}
    assert all(int(str((event.attributes or {})[Attribute.EVICTED_BLOCKS])) > 0 for event in evicted)


async def test_a_cache_hit_is_an_event(exporter: InMemorySpanExporter) -> None:
    replica = await Replica("one").start(is_traced=True)
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    for _ in range(2):
        sink = RecordingSink()
        dispatcher.submit(make_request(range(40), 4, traceparent=SAMPLED), sink)
        await sink.wait()
    await dispatcher.stop()
    await replica.stop()
    cold, warm = named(exporter, "octavo.prefill")
    assert Event.CACHE_HIT not in [event.name for event in cold.events]
    hit = warm.events[0]
    assert (hit.name, hit.timestamp) == (Event.CACHE_HIT, warm.start_time)
    assert hit.attributes == {Attribute.CACHED_INPUT_TOKENS: 39}


async def test_what_cannot_be_told_is_counted_and_slow_steps_are_told_anyway(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_telemetry, "LINKS_PER_S", 10)
    await ask(Replica("one", fake_step_s=0.002), (20, 200, SAMPLED))
    steps = named(exporter, "octavo.step")
    assert 20 <= len(steps) < 150
    numbers = [int(number(step, Attribute.STEP)) for step in steps]
    gaps = [after - before - 1 for before, after in pairwise(numbers)]
    told = [attributes(step).get(Attribute.UNTOLD_STEPS, 0) for step in steps[1:]]
    assert told == gaps
    assert sum(gaps) > 0
    decode = one(exporter, "octavo.decode")
    assert number(decode, Attribute.NUM_STEPS) == 199, "its own steps are known all the same"


def test_a_budget_is_saved_for_a_while_and_paid_back() -> None:
    budget = LinkBudget(10)
    assert budget.take(25, 100.0)
    assert not budget.take(1, 100.1)
    assert budget.take(1, 101.0)
    assert budget.take(20, 500.0)
    assert not budget.take(1, 500.0)


async def test_a_slow_step_is_the_slowest_of_its_members_and_of_nobody_else(exporter: InMemorySpanExporter) -> None:
    """One step takes a second; who came later, or had gone before, does not know of it."""
    replica = await Replica("one", fake_step_s=0.002).start(is_traced=True)
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    before, during, after = (context() for _ in range(3))
    launch, num_left = replica.engine.runner.launch, 0

    def slow_once(plan: object) -> object:
        nonlocal num_left
        ticket = launch(plan)  # type: ignore[arg-type]
        num_left -= 1
        return type(ticket)(ticket.plan, ticket.result, 1.0) if num_left == 0 else ticket

    replica.engine.runner.launch = slow_once  # type: ignore[assignment, method-assign]
    for traceparent in (before, during, after):
        sink = RecordingSink()
        num_left = 5 if traceparent is during else 0
        dispatcher.submit(make_request(range(30), 20, traceparent=traceparent), sink)
        await sink.wait()
    await until(lambda: replica.server.num_works == 0)
    await dispatcher.stop()
    await replica.stop()
    slow = [step for step in named(exporter, "octavo.step") if number(step, Attribute.STEP_DURATION) >= 1.0]
    assert [links(step) for step in slow] == [[span_id(dispatch_of(exporter, during))]]
    for traceparent in (before, during, after):
        parent = span_id(dispatch_of(exporter, traceparent))
        (decode,) = [span for span in named(exporter, "octavo.decode") if span.parent and span.parent.span_id == parent]
        (event,) = [event for event in decode.events if event.name == Event.SLOWEST_STEP]
        assert event.attributes is not None
        is_hit = traceparent is during
        assert (float(str(event.attributes[Attribute.STEP_DURATION])) >= 1.0) == is_hit
        assert (event.attributes[Attribute.STEP] == attributes(slow[0])[Attribute.STEP]) == is_hit
        assert (seconds(decode) >= 1.0) == is_hit


async def test_an_engine_that_nobody_can_watch_has_its_phases_all_the_same(exporter: InMemorySpanExporter) -> None:
    """It tells neither what it generated nor when: what is seen of its tokens has to do."""
    replica = await Replica("one", fake_step_s=0.002).start()
    drain = replica.thread.drain_outputs

    def without_times() -> list[TokenDelta]:
        return [d if d.finish is None else d._replace(finish=Finish(reason=d.finish.reason)) for d in drain()]

    replica.thread.drain_outputs = without_times  # type: ignore[method-assign]
    dispatcher = make_dispatcher()
    dispatcher.start()
    dispatcher.update_replicas([replica.address])
    sink = RecordingSink()
    dispatcher.submit(make_request(range(30), 300, traceparent=SAMPLED), sink)
    await sink.wait()
    await dispatcher.stop()
    await replica.stop()
    prefill, decode = one(exporter, "octavo.prefill"), one(exporter, "octavo.decode")
    assert number(decode, Attribute.OUTPUT_TOKENS) == 300
    assert seconds(prefill) >= 0.002
    assert seconds(decode) >= 0.002
    assert prefill.end_time == decode.start_time
    assert named(exporter, "octavo.step") == []
