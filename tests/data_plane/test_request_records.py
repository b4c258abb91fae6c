"""What a router tells of single requests, to whom, and what `octavo trace` makes of it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator

import grpc
import pytest
from octavo.client import CallError, DeadlineExceededError, NotFoundError
from octavo.v1 import status_service_pb2 as status_pb
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

from cluster.trace_view import explained, parts
from cluster.trace_words import seconds
from router.config import ObserverConfig
from tests.data_plane.rig import Replica, until
from tests.data_plane.whole_router import WholeRouter, whole_router
from tests.router.rig import eventually

PROMPT = list(range(1, 41))
TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture
async def router() -> AsyncIterator[WholeRouter]:
    async with whole_router([Replica("one", fake_step_s=0.002, max_num_sequences=2)]) as router:
        yield router


def assert_adds_up(record: status_pb.RequestRecord) -> None:
    assert sum(part.duration_s for part in parts(record)) == pytest.approx(record.duration_s, abs=1e-9)
    assert all(part.duration_s >= 0 for part in parts(record))


async def test_the_way_of_a_request(router: WholeRouter) -> None:
    parent = f"00-{TRACE}-b7ad6b7169203331-01"
    await router.client.complete(PROMPT, max_tokens=20, request_id="a", traceparent=parent)
    await router.client.complete(PROMPT, max_tokens=20, request_id="b", timeout=900.0, priority=2)
    first, second = await router.record("a"), await router.record("b")
    assert (first.code, first.reason, first.model, first.router) == ("OK", "", "toy", "router-1")
    assert first.trace_id == TRACE
    assert first.is_session
    assert not first.is_running
    assert (first.prompt_tokens, first.generated_tokens, first.max_tokens, first.num_choices) == (40, 20, 20, 1)
    assert list(first.finish_reasons) == ["length"]
    assert (first.num_messages > 0, first.sent_tokens) == (True, 20)
    assert 0 <= first.queued_at_s <= first.first_token_at_s <= first.first_sent_at_s <= first.last_sent_at_s
    assert first.computed_at_s <= first.duration_s
    (attempt,) = first.attempts
    assert (attempt.decision.replica, attempt.decision.rule) == ("one", "only")
    assert (attempt.cached_tokens, attempt.num_tokens, attempt.batch_requests, attempt.batch_tokens) == (0, 20, 1, 40)
    assert attempt.engine.num_steps >= 20
    assert attempt.engine.decode_s >= 19 * 0.002
    assert not attempt.loss
    (again,) = second.attempts
    assert (again.cached_tokens, again.decision.matched_tokens) == (39, 36)
    assert (second.priority, second.has_own_deadline, first.has_own_deadline) == (2, True, False)
    assert second.timeout_s == pytest.approx(900.0, abs=9.0)
    assert_adds_up(first)
    assert [record.request_id for record in await router.records(TRACE.upper())] == ["a"]
    text = "\n".join(explained(second))
    assert "priority 2" in text
    assert f"might take {seconds(second.timeout_s)} (as its client asked)" in text
    assert "prefilled: 39 of 40 prompt tokens were cached, 1 computed" in text
    assert "cost 4 = 4 of this prompt to compute (it has 36)" in text


async def test_what_a_request_waited_for(router: WholeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places, and six requests: the last ones wait for a place, and others go before them."""
    monkeypatch.setattr("router.session.MAX_TURN_S", 60.0)  # all six have come before the first one goes
    names = [f"r{number}" for number in range(6)]
    await asyncio.gather(
        *(router.client.complete([n] * 8, max_tokens=60, request_id=name) for n, name in enumerate(names))
    )
    last = await router.record("r5")
    (attempt,) = last.attempts
    assert attempt.wait_s > 0.05
    assert attempt.full_s > 0.8 * attempt.wait_s
    assert attempt.no_replica_s == 0
    assert (attempt.num_waiting, attempt.num_gone) == (5, 5)
    text = "\n".join(explained(last))
    assert re.search(r"queued: nobody was free for [\d.]+ m?s.*; 5 waited when it came, 5 went before it", text)
    assert_adds_up(last)


async def test_the_wait_for_a_running_step_is_the_replicas() -> None:
    """It was nobody's: a work that came while a step ran was taken for new when the engine looked for new ones."""
    slow = Replica("slow")
    async with whole_router([slow]) as router:
        slow.hold()
        first = asyncio.create_task(router.client.complete([1] * 8, max_tokens=8))
        await until(lambda: slow.server.num_works == 1)
        second = asyncio.create_task(router.client.complete([2] * 8, max_tokens=1, request_id="b"))
        await until(lambda: slow.server.num_works == 2)
        await asyncio.sleep(0.2)
        slow.go_on()
        await asyncio.gather(first, second)
        (attempt,) = (await router.record("b")).attempts
        assert attempt.engine.queue_s >= 0.2
        assert attempt.sent_at_s + attempt.engine.queue_s + attempt.engine.prefill_s <= attempt.left_at_s


async def test_a_wait_for_a_first_replica() -> None:
    async with whole_router([]) as router:
        running = asyncio.create_task(router.client.complete(PROMPT, max_tokens=4, request_id="early"))
        await until(lambda: router.dispatcher.backlog().num_queued_requests == 1)
        waiting = await router.record("early")
        assert waiting.is_running
        assert not waiting.attempts
        assert "queued, and still waiting" in "\n".join(explained(waiting))
        replica = await Replica("late").start()
        await asyncio.sleep(0.1)
        router.dispatcher.update_replicas([replica.address])
        await running
        (attempt,) = (await router.record("early")).attempts
        assert attempt.no_replica_s > 0.1
        assert attempt.no_replica_s > 0.9 * attempt.wait_s
        assert "no replica was ready for" in "\n".join(explained(await router.record("early")))
        await replica.stop()


async def test_an_answer_that_goes_on_elsewhere() -> None:
    one, two = Replica("one", fake_step_s=0.005), Replica("two", fake_step_s=0.005)
    async with whole_router([one, two]) as router:

        async def has_tokens() -> bool:
            return (await router.record("a")).attempts[0].num_tokens > 0

        answer = asyncio.create_task(router.client.complete(PROMPT, max_tokens=400, request_id="a"))
        await until(lambda: router.meters.value("octavo.requests.dispatched") == 1)
        await eventually(has_tokens)
        running = await router.record("a")
        assert running.is_running
        lost = {"one": one, "two": two}[running.attempts[0].decision.replica]
        await lost.kill()
        await answer
        record = await router.record("a")
        first, second = record.attempts
        assert first.num_tokens + second.num_tokens == 400
        assert first.loss_reason == "REPLICA_LOST"
        assert f"replica {lost.replica_id} was lost" in first.loss
        assert not first.HasField("engine")
        assert second.HasField("engine")
        assert (first.decision.attempt, second.decision.attempt) == (1, 2)
        assert_adds_up(record)
        assert f"lost (REPLICA_LOST): replica {lost.replica_id} was lost" in "\n".join(explained(record))


async def test_what_was_refused_and_what_came_too_late(router: WholeRouter) -> None:
    async def is_late_known() -> bool:
        return not (await router.record("b")).is_running

    with pytest.raises(NotFoundError):
        await router.client.complete(PROMPT, model="no such model", request_id="a")
    refused = await router.record("a")
    assert (refused.code, refused.reason, refused.model) == ("NOT_FOUND", "MODEL_NOT_FOUND", "no such model")
    assert not refused.HasField("queued_at_s")
    assert "refused, before it was queued" in "\n".join(explained(refused))
    assert "must be one of the served models (toy), is 'no such model'" in "\n".join(explained(refused))
    assert_adds_up(refused)
    with pytest.raises(DeadlineExceededError):
        await router.client.complete(PROMPT, max_tokens=900, timeout=1.0, request_id="b")
    await eventually(is_late_known)  # the client may have known it sooner than the router
    late = await router.record("b")
    assert late.reason == "DEADLINE_PASSED"
    assert late.attempts[0].num_tokens > 0
    assert "came before the router ended it" in "\n".join(explained(late))
    assert_adds_up(late)


async def test_so_many_are_remembered_and_the_slowest_are_listed() -> None:
    async with whole_router([Replica("one")], observer=ObserverConfig(max_kept_requests=3)) as router:
        for number in range(5):
            await router.client.complete([number], max_tokens=2, request_id=f"r{number}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.records("r1")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "remembers no request and no trace 'r1' of yours" in (caught.value.details() or "")
        assert "the last 3 that have ended" in (caught.value.details() or "")
        found = await router.client.slowest_requests(2)
        assert (found.num_kept, found.max_kept, len(found.records)) == (3, 3, 2)
        durations = [record.duration_s for record in (await router.client.slowest_requests()).records]
        assert durations == sorted(durations, reverse=True)
        assert len(durations) == 3
        assert not (await router.client.slowest_requests(model="other")).records
        await router.client.complete([1], max_tokens=2, request_id="r4")  # an id may be used again
        assert len(await router.records("r4")) == 2


async def test_what_a_client_writes_at_any_length_is_cut(router: WholeRouter) -> None:
    """A router that kept 2,048 names of models of a megabyte each would have no memory left."""
    with pytest.raises(CallError):
        await router.client.complete(PROMPT, model="x" * 1_000_000, request_id="long")
    record = await router.record("long")
    assert record.model == "x" * 128
    assert len(record.message) <= 500
    with pytest.raises(grpc.aio.AioRpcError):
        await router.ask(5, name="y" * 1_000_000)
    assert (await router.record("y" * 128)).reason == "INVALID_FIELD"
    assert (await router.record("y" * 10_000)).request_id == "y" * 128


async def test_steps_preemptions_and_what_was_coalesced() -> None:
    """Blocks for less than two of four answers; then a step that takes no time, whose tokens come many at once."""
    tight, quick = Replica("tight", num_blocks=24, fake_step_s=0.001), Replica("quick")
    async with whole_router([tight]) as router:
        asked = [router.client.complete([n] * 20, max_tokens=40, request_id=f"r{n}") for n in range(1, 5)]
        await asyncio.gather(*asked)
        engines = [(await router.record(f"r{n}")).attempts[-1].engine for n in range(1, 5)]
        assert sum(engine.num_preemptions for engine in engines) > 0
        assert all(engine.num_steps >= 40 for engine in engines)
    async with whole_router([quick]) as router:
        await router.client.complete([1] * 20, max_tokens=400, request_id="a")
        record = await router.record("a")
        assert 1 <= record.num_messages < record.sent_tokens == 400
        text = "\n".join(explained(record))
        assert f"sent: 400 tokens coalesced in {record.num_messages} messages" in text


async def test_a_tenant_sees_its_own_requests_alone() -> None:
    async with whole_router([Replica("one")], tenant_header="x-tenant") as router:
        await router.client.complete(PROMPT, max_tokens=2, request_id="nobody's")
        async with grpc.aio.insecure_channel(router.address) as channel:
            await router.ask(7, ("x-tenant", "acme"), name="acme's")
            stub = StatusServiceStub(channel)
            listed = status_pb.ListRequestRecordsRequest()
            for tenant, own, other in (
                ("acme", "acme's", "nobody's"),
                ("", "nobody's", "acme's"),
                ("beta", "", "acme's"),
            ):
                metadata = (("x-tenant", tenant),) if tenant else ()
                found = await stub.ListRequestRecords(listed, metadata=metadata)
                assert [record.request_id for record in found.records] == ([own] if own else [])
                if own:
                    assert (await router.records(own, *metadata))[0].tenant == tenant
                for unknown in (other, " "):
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await router.records(unknown, *metadata)
                    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_without_room_nothing_is_remembered_but_what_runs() -> None:
    async with whole_router([Replica("one")], observer=ObserverConfig(max_kept_requests=0)) as router:
        await router.client.complete(PROMPT, max_tokens=2, request_id="a")
        with pytest.raises(NotFoundError):
            await router.client.find_requests("a")


def lines(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.name == "router.access_log"]


async def test_a_line_is_logged_for_each_request_without_its_texts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="router.access_log")
    async with whole_router([Replica("one")], observer=ObserverConfig(logs_requests=True)) as router:
        parent = f"00-{TRACE}-b7ad6b7169203331-01"
        await router.client.complete("secret", max_tokens=3, request_id="a", traceparent=parent)
        with pytest.raises(CallError):
            await router.client.complete("secret", model="x y\n", request_id="b\nrequest=a")
    good, bad = lines(caplog)
    assert re.fullmatch(
        r"request=a tenant=- model=toy code=OK reason=- via=session priority=0 prompt=6 cached=0 generated=3 "
        r"attempts=1 replica=one queued_s=0\.0\d\d first_token_s=0\.\d{3} total_s=0\.\d{3} finish=length trace="
        + TRACE,
        good.getMessage(),
    )
    assert (good.request_id, good.traceparent[:35]) == ("a", f"00-{TRACE}")  # type: ignore[attr-defined]
    assert 'request="b\\nrequest=a"' in bad.getMessage()
    assert "code=NOT_FOUND reason=MODEL_NOT_FOUND" in bad.getMessage()
    assert "secret" not in caplog.text


async def test_texts_are_logged_if_that_is_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="router.access_log")
    observer = ObserverConfig(logs_requests=True, logs_prompts=True)
    async with whole_router([Replica("one")], observer=observer) as router:
        answer = await router.client.complete("what?", max_tokens=3)
        await router.client.complete([1, 2], max_tokens=1)
        await router.client.complete([{"role": "user", "content": "hi"}], max_tokens=1)
    text, ids, messages = (line.getMessage().partition(" texts=")[2] for line in lines(caplog))
    assert text.startswith('{"prompt": "what?", "answers": ["')
    assert json.dumps([answer.choices[0].text], ensure_ascii=False) in text
    assert ids.startswith('{"prompt": [1, 2], ')
    assert messages.startswith('{"prompt": [{"role": "user", "content": "hi"}], ')
