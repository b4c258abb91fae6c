"""Requests through the router's back, over real gRPC, to fake engines: tokens, places, the queue, refusals, the log."""

from __future__ import annotations

import asyncio
import random
from functools import partial
from pathlib import Path

import pytest
from octavo.names import Reason

from router.decision_log import read_decision
from tests.data_plane.rig import (
    VOCAB,
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    cluster,
    make_prompt,
    make_request,
    until,
)
from workers.errors import InvalidRequestError, OverloadedError, UnavailableError
from workers.fake import fake_continuation, fake_next_token


async def test_answers_are_the_engines_token_for_token() -> None:
    rng = random.Random(1)
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two) as dispatcher:
        requests = [make_request(make_prompt(rng, rng.randrange(1, 100)), rng.randrange(1, 40)) for _ in range(60)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
            assert len(sink.decisions) == 1
            assert sink.cached_tokens is not None
        assert {sink.decisions[0].replica for sink in sinks} == {"one", "two"}
        await assert_idle(dispatcher, one, two)


async def test_a_repeated_prompt_is_placed_where_it_is_cached() -> None:
    prompt = make_prompt(random.Random(2), 41)
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two) as dispatcher:
        await until(lambda: all(view.state == "ready" for view in dispatcher.replicas()))
        first = RecordingSink()
        dispatcher.submit(make_request(prompt), first)
        await first.wait()
        home = first.decisions[0].replica
        await until(lambda: len(dispatcher._fleet._present[home].state.resident) >= 10)
        for _ in range(5):
            sink = RecordingSink()
            dispatcher.submit(make_request(prompt), sink)
            await sink.wait()
            assert sink.decisions[0].replica == home
            assert sink.decisions[0].rule == "prefix"
            assert sink.decisions[0].matched_tokens == sink.cached_tokens == 40


async def test_a_replica_tells_how_many_of_its_guesses_were_right() -> None:
    """The prompt ends as it began, and the engine happens to go on as the prompt did there."""
    prompts = ([5, 6, follower, filler, 5, 6] for filler in range(100) for follower in range(VOCAB))
    prompt = next(prompt for prompt in prompts if fake_next_token(prompt, VOCAB) == prompt[2])
    replica = Replica("one", lookup_tokens=3)
    async with cluster(replica) as dispatcher:
        request, sink = make_request(prompt, 60), RecordingSink()
        dispatcher.submit(request, sink)
        assert_answers(await sink.wait(), request)
        await until(lambda: dispatcher.replicas()[0].load == replica.engine.load())
        load = dispatcher.replicas()[0].load
        assert load.num_drafted_tokens > load.num_accepted_tokens > 0


async def test_every_choice_is_delivered_and_counted() -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        request, sink = make_request(range(30), 12, n=3), RecordingSink()
        dispatcher.submit(request, sink)
        await sink.wait()
        expected = fake_continuation(request.prompt, 12, VOCAB)
        assert sink.answers == dict.fromkeys(range(3), expected)
        assert set(sink.finishes) == {0, 1, 2}
        assert replica.thread.load().num_computed_tokens < 30 + 3 * 13, "the prompt is computed once"
        await assert_idle(dispatcher, replica)


async def test_a_burst_waits_for_the_first_replica() -> None:
    replica = Replica("one")
    async with cluster() as dispatcher:
        requests = [make_request(range(i, i + 10)) for i in range(100)]
        sinks = [RecordingSink() for _ in requests]
        for request, sink in zip(requests, sinks, strict=True):
            dispatcher.submit(request, sink)
        await asyncio.sleep(0.05)
        assert dispatcher.backlog().num_queued_requests == 100
        await replica.start()
        dispatcher.update_replicas([replica.address])
        for request, sink in zip(requests, sinks, strict=True):
            assert_answers(await sink.wait(), request)
        await assert_idle(dispatcher, replica)
    await replica.stop()


async def test_without_a_replica_requests_wait_so_long_and_no_longer() -> None:
    async with cluster(no_replica_wait_s=0.1) as dispatcher:
        waiting = []
        for _ in range(2):
            request, sink = make_request(range(10)), RecordingSink()
            dispatcher.submit(request, sink)
            waiting.append((request, sink))
            await asyncio.sleep(0.06)
        for request, sink in waiting:
            await sink.wait()  # far sooner than its deadline, which is half a minute away
            assert sink.ended_at - request.accepted_at >= 0.0999, "each as long"
            assert isinstance(sink.error, UnavailableError)
            assert sink.error.reason == Reason.NO_REPLICA


async def test_more_than_the_backlog_is_refused_with_the_numbers() -> None:
    async with cluster(max_queued_tokens=100) as dispatcher:
        cancels = [dispatcher.submit(make_request(range(40)), RecordingSink()) for _ in range(2)]
        with pytest.raises(OverloadedError, match="2 requests with 80 tokens") as refusal:
            dispatcher.submit(make_request(range(40)), RecordingSink())
        assert refusal.value.reason == Reason.QUEUE_FULL
        assert refusal.value.retry_after_s is not None
        cancels.pop()()
        cancels.append(dispatcher.submit(make_request(range(40)), RecordingSink()))
        for cancel in cancels:
            cancel()


async def test_what_the_engine_refuses_is_the_requests_error() -> None:
    replica = Replica("one")
    async with cluster(replica) as dispatcher:
        sink = RecordingSink()
        dispatcher.submit(make_request(range(900), 900), sink)
        await sink.wait()
        assert isinstance(sink.error, InvalidRequestError)
        assert sink.error.reason == Reason.PROMPT_TOO_LONG
        await assert_idle(dispatcher, replica)


async def test_priority_goes_first_when_there_is_a_queue() -> None:
    replica = Replica("one", max_num_sequences=1)
    async with cluster() as dispatcher:
        order: list[int] = []
        sinks = []
        for priority in (5, 3, 5, 0, 4, 1):
            sink = RecordingSink()
            sink.on_tokens = partial(order.append, priority)
            dispatcher.submit(make_request(range(64), 1, priority=priority), sink)
            sinks.append(sink)
        await replica.start()
        dispatcher.update_replicas([replica.address])
        for sink in sinks:
            await sink.wait()
        assert order == sorted(order)
    await replica.stop()


async def test_decisions_go_to_a_file_that_is_whole_when_the_router_has_stopped(tmp_path: Path) -> None:
    path = tmp_path / "decisions"
    one, two = Replica("one"), Replica("two")
    async with cluster(one, two, decision_log=str(path)) as dispatcher:
        sinks = [RecordingSink() for _ in range(20)]
        for sink in sinks:
            dispatcher.submit(make_request(range(30)), sink)
        for sink in sinks:
            await sink.wait()
    read = [read_decision(line) for line in path.read_text().splitlines()]
    assert [decision for decision, _ in filter(None, read)] == [sink.decisions[0] for sink in sinks], (
        "in the order in which they were made"
    )
