"""What only some engines can do: refused by name where none can, and sent to those that can."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Attribute, Reason
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from router.dispatcher import Dispatcher
from router.metrics import RouterMetrics
from router.types import Request
from tests.data_plane.rig import (
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    make_dispatcher,
    make_prompt,
    make_request,
    ready_cluster,
)
from tests.data_plane.spans import SAMPLED, links, named, number
from tests.data_plane.whole_router import Meters
from workers.errors import CapabilityError
from workers.fake import FakeRunner, FakeTicket
from workers.plan import StepPlan
from workers.types import (
    CAPABILITY_GENERATE,
    CAPABILITY_LOGIT_BIAS,
    CAPABILITY_LOGPROBS,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from workers.wire import from_work


class TellingRunner(FakeRunner):
    """Says of each token that its log probability is its id, negated."""

    def launch(self, plan: StepPlan) -> FakeTicket:
        ticket = super().launch(plan)
        logprobs = [
            tuple(TokenLogprobs(-float(t), ((t, -float(t)),)) for t in tokens) for tokens in ticket.result.tokens
        ]
        return replace(ticket, result=replace(ticket.result, logprobs=logprobs))


def able_replica(replica_id: str, **engine: Any) -> Replica:
    """A replica with all capabilities."""
    replica = Replica(replica_id, **engine)
    engine_ = replica.engine
    able = engine_.info.capabilities | {CAPABILITY_LOGPROBS, CAPABILITY_LOGIT_BIAS}
    engine_._info = replace(engine_.info, capabilities=able)
    engine_._runner = TellingRunner(engine_.info.vocab_size)
    return replica


@asynccontextmanager
async def started(*replicas: Replica) -> AsyncIterator[Dispatcher]:
    async with ready_cluster(*replicas) as dispatcher:
        yield dispatcher
        await assert_idle(dispatcher, *replicas)


NEEDY = [
    ({"num_logprobs": 0}, "logprobs"),
    ({"sampling": SamplingParams(temperature=0.0, logit_bias={1: 1.0})}, "sampling.logit_bias"),
    ({"sampling": SamplingParams(temperature=0.0, format=("regex", "a+"))}, "response_format"),
]


@pytest.mark.parametrize(("fields", "field"), NEEDY)
async def test_what_no_engine_can_do_is_refused_at_once(fields: dict[str, Any], field: str) -> None:
    async with started(Replica("one")) as dispatcher:
        with pytest.raises(CapabilityError) as refusal:
            dispatcher.submit(make_request(range(9), **fields), RecordingSink())
        [violation] = refusal.value.violations
        assert violation.field == field
        assert repr(field.rpartition(".")[2]) in violation.description
        assert refusal.value.reason == Reason.ENGINE_CAPABILITY


async def test_it_is_refused_as_soon_as_the_first_replica_has_said_what_it_can_do() -> None:
    replica = Replica("one")
    dispatcher = make_dispatcher()
    dispatcher.start()
    needy, plain = RecordingSink(), RecordingSink()
    dispatcher.submit(make_request(range(9), num_logprobs=1), needy)
    dispatcher.submit(plain_request := make_request(range(9)), plain)
    await replica.start()
    dispatcher.update_replicas([replica.address])
    assert isinstance((await needy.wait()).error, CapabilityError)
    assert needy.decisions == []
    assert_answers(await plain.wait(), plain_request)
    await assert_idle(dispatcher, replica)
    await dispatcher.stop()
    await replica.stop()


async def test_a_replica_refuses_by_itself_what_its_engine_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a router knows less of capabilities than the replica."""
    monkeypatch.setattr(Request, "needed_capabilities", frozenset())
    async with started(Replica("one")) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(9), num_logprobs=1, n=2), sink)
        error = (await sink.wait()).error
        assert isinstance(error, CapabilityError)
        assert str(error) == "engine fake lacks the capability logprobs"


async def test_it_goes_to_the_replicas_that_can_and_waits_for_them() -> None:
    """More than the one that can has credit for; meanwhile the other one is not held up."""
    able, other = able_replica("able", max_num_sequences=2), Replica("other")
    async with started(able, other) as dispatcher:
        requests = [make_request(range(i, i + 40), num_logprobs=None if i % 2 else 1) for i in range(20)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
            if request.num_logprobs is not None:
                assert sink.decisions[-1].replica == "able"
                assert [each.logprob for each in sink.logprobs] == [-float(token) for token in sink.token_ids]
                assert [each.top[0][0] for each in sink.logprobs] == sink.token_ids


async def test_who_has_to_wait_on_is_in_no_batch_until_it_goes(exporter: InMemorySpanExporter) -> None:
    """Else each look at the queue, while the replica that can is full and the other one is not, would be a batch."""
    meters = Meters()
    async with started(able_replica("able", max_num_sequences=2), Replica("other")) as dispatcher:
        dispatcher.measure(RouterMetrics(meters.meter, ["fake"], max_tenants=0))
        requests = [make_request([i] * 40, 20, num_logprobs=1, traceparent=SAMPLED) for i in range(12)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        for sink in sinks:
            assert (await sink.wait()).error is None
    for name, total in (("octavo.batch.requests", 12), ("octavo.batch.tokens", 12 * 40)):
        (point,) = meters.points(name).values()
        assert point.sum == total, name
    batches = named(exporter, "octavo.batch")
    assert len(batches) > 1
    assert [len(links(batch)) for batch in batches] == [number(batch, Attribute.BATCH_REQUESTS) for batch in batches]


async def test_each_token_of_each_choice_has_its_log_probability() -> None:
    able = able_replica("able")
    async with started(able) as dispatcher:
        request, sink = make_request(make_prompt(dispatcher._rng, 30), 200, n=3, num_logprobs=1), RecordingSink()
        dispatcher.submit(request, sink)
        await sink.wait()
        tokens = [token for answer in sink.answers.values() for token in answer]
        assert len(sink.logprobs) == len(tokens) == 600
        assert sorted(each.logprob for each in sink.logprobs) == sorted(-float(token) for token in tokens)


async def test_an_answer_goes_on_after_what_was_received() -> None:
    """Computed once more, or found in the cache where it was generated; never sent again."""
    replica = Replica("one")
    async with started(replica) as dispatcher:
        whole, first = make_request(range(30), 40), RecordingSink()
        dispatcher.submit(whole, first)
        await first.wait()
        for cut in (1, 17, 39):
            request, sink = replace(whole, received=[first.token_ids[:cut]]), RecordingSink()
            dispatcher.submit(request, sink)
            await sink.wait()
            assert first.token_ids[:cut] + sink.token_ids == first.token_ids
            assert sink.finish is not None
            assert sink.decisions[0].matched_tokens == (30 + cut - 1) // 4 * 4


async def test_each_choice_goes_on_after_what_was_received_of_it() -> None:
    """One of them is over; what all share is computed once."""
    replica = Replica("one")
    async with started(replica) as dispatcher:
        whole = make_request(range(30), 40, n=3)
        first = RecordingSink()
        dispatcher.submit(whole, first)
        await first.wait()
        cuts = (5, 40, 22)
        received = [first.answers[index][:cut] for index, cut in enumerate(cuts)]
        request, sink = replace(whole, received=received), RecordingSink()
        dispatcher.submit(request, sink)
        await sink.wait()
        for index, had in enumerate(received):
            assert [*had, *sink.answers.get(index, [])] == first.answers[index]
        assert [sink.finishes[index].reason for index in range(3)] == [FinishReason.LENGTH] * 3


async def test_a_choice_that_its_router_knows_to_be_over_is_not_generated() -> None:
    replica = Replica("one")
    async with started(replica) as dispatcher:
        request, sink = make_request(range(30), 40, n=2, received=[[7, 8], [9]]), RecordingSink()
        cancel = dispatcher.submit(request, sink)
        sink.not_wanted.add(0)
        cancel(0)
        await sink.wait()
        assert list(sink.finishes) == [1]
        assert len(sink.answers[1]) == 39
        assert replica.engine.runner.num_computed_rows <= 31 + 39


async def test_a_router_shows_what_its_replicas_can_do() -> None:
    async with started(able_replica("able"), Replica("plain")) as dispatcher:
        views = {view.replica_id: view.capabilities for view in dispatcher.replicas()}
        assert views["able"] - views["plain"] == {CAPABILITY_LOGPROBS, CAPABILITY_LOGIT_BIAS}
        assert CAPABILITY_GENERATE in views["plain"]


async def test_several_choices_that_go_on_are_for_replicas_that_know_how() -> None:
    """An older one would begin them anew."""
    older = Replica("older")
    older.engine._info = replace(older.engine.info, capabilities=frozenset({CAPABILITY_GENERATE}))
    async with started(older) as dispatcher:
        with pytest.raises(CapabilityError) as refusal:
            dispatcher.submit(make_request(range(9), n=2, received=[[1], []]), RecordingSink())
        assert [violation.field for violation in refusal.value.violations] == ["received_token_ids"]
        request, sink = make_request(range(9), received=[[1]]), RecordingSink()
        dispatcher.submit(request, sink)
        assert (await sink.wait()).error is None


def test_a_work_has_a_list_for_each_choice_or_none() -> None:
    generate = pb.Generate(prompt_token_ids=[1], max_tokens=9, n=3, received_choices=[pb.TokenIds(ids=[1])])
    with pytest.raises(ValueError, match="a list for each of 3 choices, has 1"):
        from_work(pb.Work(work_id=1, generate=generate), "owner", 0.0)
