"""Many requests over one Session: windows, cancels, attaching again, taking over, going away."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types

from tests.router.rig import ClientSession, Rig, answering, eventually, running, text_request

OK, CANCELLED = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED
INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


async def test_many_requests_share_a_stream_and_a_tick_s_tokens_a_message(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.send(starts=[pb.Start(request_id=f"r{i}", request=text_request(f"p{i}")) for i in range(20)])
        works = [await rig.backend.work(i) for i in range(20)]
        for step in range(5):
            for work in works:
                work.emit(str(step))
            await session.until(lambda: all(len(session.known(f"r{i}").text) > step for i in range(20)))  # noqa: B023
        for work in works:
            work.finish()
        for i in range(20):
            outcome = await session.outcome(f"r{i}")
            assert (outcome.code, outcome.text) == (OK, "01234")
        assert session.num_messages == 6
    await rig.assert_nothing_left()


async def turns_during_starts(rig: Rig, number: int, *, take_s: float = 0.0) -> list[int]:
    """Send so many starts in one message; return how many works there were whenever others, who take `take_s`, had
    their turn, until all were."""
    seen: list[int] = []

    async def others() -> None:
        while not seen or seen[-1] < number:
            time.sleep(take_s)  # noqa: ASYNC251  as who computes does
            seen.append(len(rig.backend.works))
            await asyncio.sleep(0)

    rig.backend.script = answering("x")
    async with rig.open_session() as session:
        watching = asyncio.create_task(others())
        await session.send(starts=[pb.Start(request_id=f"r{i}", request=text_request()) for i in range(number)])
        await asyncio.wait_for(watching, 20)
        for i in range(number):
            assert (await session.outcome(f"r{i}")).text == "x"
    return seen


async def test_a_message_with_many_starts_lets_others_have_their_turn(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was started of it is on its way to replicas before all of it is."""
    monkeypatch.setattr("router.session.MAX_TURN_S", 0.0)
    seen = await turns_during_starts(rig, 50)
    assert max(after - before for before, after in itertools.pairwise(seen)) <= 2


async def test_others_whose_turns_are_long_do_not_have_one_after_each_start(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their time was counted as that of the starts, so that from the first turn on each start had one of its own."""
    monkeypatch.setattr("router.session.MAX_TURN_S", 0.005)
    seen = await turns_during_starts(rig, 200, take_s=0.01)
    assert sum(0 < number < 200 for number in seen) < 100


async def test_a_session_ends_when_the_client_has_finished(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request())
        await session.call.done_writing()
        (await rig.backend.work()).finish()
        assert (await session.outcome("a")).code == OK
        await session.read()
        assert session.is_over
        assert await session.call.code() == OK
    await rig.assert_nothing_left()


async def test_requests_end_each_in_its_own_way(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("good", text_request())
        await session.start("bad", text_request(max_tokens=-1))
        await session.start("late", text_request(), timeout=Duration(nanos=100_000_000))
        good = await rig.backend.work(0)
        assert (await session.outcome("bad")).code == INVALID
        late = await session.outcome("late")
        assert (late.code, late.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")
        good.emit("fine")
        good.finish()
        assert (await session.outcome("good")).text == "fine"
        assert all(outcome.num_terminals == 1 for outcome in session.outcomes.values())
    await rig.assert_nothing_left()


async def test_cancel(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request())
        work = await rig.backend.work()
        work.emit("some")
        await session.text("a", "some")
        await session.cancel("a")
        await session.cancel("never heard of")
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.reason) == (CANCELLED, "CANCELLED")
        assert outcome.usage is not None
        assert outcome.usage.generated_tokens == 4
        assert work.is_cancelled
        await session.cancel("a")
        await session.start("b", text_request())
        (await rig.backend.work(1)).finish()
        assert (await session.outcome("b")).code == OK
        assert session.outcomes["a"].num_terminals == 1


async def test_a_start_and_its_cancel_in_one_message(rig: Rig) -> None:
    """Also while its prompt is still being tokenized in a thread."""
    chat = types.ChatMessage(role="user", content=[types.ContentPart(text="x")])
    messages = pb.GenerateRequest(prompt=types.Prompt(messages=types.ChatMessages(messages=[chat])))
    for request in (text_request(), messages):
        async with rig.open_session() as session:
            await session.send(starts=[pb.Start(request_id="a", request=request)], cancels=[pb.Cancel(request_id="a")])
            assert (await session.outcome("a")).code == CANCELLED
    await rig.assert_nothing_left()


async def test_windows(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("narrow", text_request(), window=3)
        await session.start("wide", text_request())
        await session.start("shut", text_request(), window=0)
        narrow, wide, shut = [await rig.backend.work(i) for i in range(3)]
        for work in (narrow, wide, shut):
            work.emit("abcdefgh")
            work.finish()
        assert (await session.outcome("wide")).text == "abcdefgh"
        assert session.known("narrow").text == "abc"
        assert session.known("shut").text == ""
        await session.grant("narrow", 2)
        await session.text("narrow", "abcde")
        await session.grant("narrow", 2)
        await session.text("narrow", "abcdefg")
        assert session.known("narrow").num_terminals == 0
        await session.grant("narrow", 100)
        assert (await session.outcome("narrow")).text == "abcdefgh"
        await session.grant("shut", 8)
        assert (await session.outcome("shut")).code == OK
        assert narrow.is_over


async def test_a_window_that_is_exactly_used_up_does_not_hold_the_end_back(rig: Rig) -> None:
    rig.backend.script = answering("abc")
    assert (await rig.session(text_request(), window=3)).code == OK


async def test_an_error_does_not_wait_for_a_window(rig: Rig) -> None:
    rig.backend.script = lambda work: work.emit("abc")
    async with rig.open_session() as session:
        await session.start("a", text_request(), window=1, timeout=Duration(nanos=100_000_000))
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.text) == (grpc.StatusCode.DEADLINE_EXCEEDED, "a")


async def test_an_unread_request_ends_and_its_siblings_do_not() -> None:
    async with running(slow_consumer_s=1.0) as rig, rig.open_session() as session:
        await session.start("unread", text_request(), window=2)
        await session.start("read", text_request())
        unread, read = await rig.backend.work(0), await rig.backend.work(1)
        unread.emit("abc")
        num_emitted = 0
        while not unread.is_over:
            read.emit("x")
            num_emitted += 1
            await asyncio.sleep(0.05)
        outcome = await session.outcome("unread")
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
        assert outcome.text == "ab"
        assert unread.is_cancelled
        read.finish()
        assert (await session.outcome("read")).text == "x" * num_emitted


async def test_a_request_without_output_is_nobody_s_fault() -> None:
    """A slow engine is no slow consumer, also after an attachment."""
    async with running(slow_consumer_s=60.0) as rig:
        async with rig.open_session() as first:
            await first.start("a", text_request(), window=5)
            work = await rig.backend.work()
            work.emit("x")
            await first.text("a", "x")
        async with rig.open_session() as session:
            await session.attach("a", b"x")
            await session.grant("a", 5)
            await session.start("refused", text_request(max_tokens=-1))
            await session.outcome("refused")  # by now the router has read what came before, and a minute goes by
            answers = rig.server.intake._answers
            assert [answer.pending_since for answer in answers] == [None]
            rig.server.intake._sweep(time.monotonic() + 61.0)
            work.finish()
            assert (await session.outcome("a")).code == OK


async def test_a_client_that_reads_nothing_loses_its_session() -> None:
    async with running(slow_consumer_s=0.2, session_grace_s=0.2) as rig, rig.open_session() as session:
        await session.start("a", text_request())
        work = await rig.backend.work()
        while not work.is_over:
            work.emit(b"x" * 3_000)
            await asyncio.sleep(0.005)
        await eventually(lambda: rig.server.sessions.num_known == 0)
        await rig.assert_nothing_left()
        with pytest.raises(grpc.aio.AioRpcError, match="nothing of this answer was taken"):
            await session.until(lambda: False)
        assert await session.call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_an_id_is_one_request_s(rig: Rig) -> None:
    async with rig.open_session() as session, rig.open_session() as other:
        await session.start("a", text_request())
        work = await rig.backend.work()
        for stream in (session, other):
            await stream.start("a", text_request())
            refusal = await stream.outcome("a")
            assert (refusal.code, refusal.reason) == (INVALID, "REQUEST_ID_IN_USE")
        session.outcomes.clear()
        work.emit("x")
        work.finish()
        assert (await session.outcome("a")).text == "x"
        assert len(rig.backend.works) == 1


async def test_an_id_is_free_again_after_its_terminal(rig: Rig) -> None:
    rig.backend.script = answering("x")
    async with rig.open_session() as session:
        for _ in range(3):
            await session.start("a", text_request())
            assert (await session.outcome("a")).text == "x"
            session.outcomes.clear()
    await rig.assert_nothing_left()


async def lose(session: ClientSession, rig: Rig) -> None:
    """Break a stream, and wait until the router knows."""
    session.call.cancel()
    await eventually(lambda: rig.server.sessions.num_open == 0)


async def test_attach_again(rig: Rig) -> None:
    """The rest comes from the token that the client names, with the text of exactly those tokens."""
    text = "héllo 서울 wörld"
    tokens = list(text.encode())
    async with rig.open_session() as first:
        await first.start("a", text_request(stop=["wörld!"]))
        work = await rig.backend.work()
        work.emit(tokens[:10])
        await first.until(lambda: len(first.known("a").token_ids) == 10)
        await lose(first, rig)
    work.emit(tokens[10:])
    for offset in (10, 0, 2, 7):
        async with rig.open_session() as session:
            await session.attach("a", tokens[:offset])
            await session.until(lambda: session.known("a").token_ids == tokens)
            await lose(session, rig)
    async with rig.open_session() as session:
        await session.start("a", attach_offsets=[0])
        work.finish()
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.text, outcome.token_ids) == (OK, text, tokens)
    assert len(rig.backend.works) == 1
    await rig.assert_nothing_left()


async def test_text_of_every_cut_joins_to_the_whole(rig: Rig) -> None:
    """What a client had up to a cut and what an attachment there brings is the whole text: for every cut."""
    text = "é한🙂 end E"
    tokens = list(text.encode())
    async with rig.open_session() as session:
        await session.start("a", text_request(stop=["END"]))
        work = await rig.backend.work()
        pieces: list[str] = []
        for token in tokens:
            before = session.known("a").text
            work.emit([token])
            await session.until(lambda: len(session.known("a").token_ids) == len(pieces) + 1)
            pieces.append(session.known("a").text[len(before) :])
        await lose(session, rig)
    work.finish()
    for cut in range(len(tokens) + 1):
        async with rig.open_session() as session:
            await session.attach("a", tokens[:cut])
            outcome = await session.outcome("a")
            assert (outcome.code, "".join(pieces[:cut]) + outcome.text) == (OK, text)
            await lose(session, rig)


async def test_an_ended_answer_waits_for_its_client(rig: Rig) -> None:
    async with rig.open_session() as first:
        await first.start("a", text_request(), window=0)
        work = await rig.backend.work()
        work.emit("abc")
        work.finish()
        await lose(first, rig)
    async with rig.open_session() as second:
        await second.start("a", attach_offsets=[0])
        outcome = await second.outcome("a")
        assert (outcome.code, outcome.text) == (OK, "abc")


async def test_a_terminal_that_may_have_been_lost_is_told_again(rig: Rig) -> None:
    """A write that returned has not arrived: a stream that broke just then must not cost the answer."""
    rig.backend.script = answering("abc")
    async with rig.open_session() as first:
        await first.start("a", text_request())
        await first.outcome("a")
        async with rig.open_session() as second:
            await second.attach("a", b"a")
            outcome = await second.outcome("a")
            assert (outcome.code, outcome.text) == (OK, "bc")
            assert outcome.finish is not None
    assert len(rig.backend.works) == 1
    await rig.assert_nothing_left()


async def test_a_cancel_of_an_answer_that_is_over_brings_its_terminal(rig: Rig) -> None:
    """Attached again with a window that its rest does not fit into, it could not be ended, and held its id for good."""
    rig.backend.script = answering("abc")
    async with rig.open_session() as session:
        await session.start("a", text_request())
        await session.outcome("a")
        await session.attach("a", window=0)
        await session.start("a", text_request())
        assert (await session.outcome("a")).reason == "REQUEST_ID_IN_USE"
        session.outcomes.clear()
        await session.cancel("a")
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.text) == (OK, "")
        await session.start("a", text_request())
        session.outcomes.clear()
        assert (await session.outcome("a")).text == "abc"
    assert len(rig.backend.works) == 2
    await rig.assert_nothing_left()


async def test_a_newer_stream_takes_over(rig: Rig) -> None:
    async with rig.open_session() as old, rig.open_session() as new:
        await old.start("a", text_request())
        work = await rig.backend.work()
        work.emit("ab")
        await old.text("a", "ab")
        await new.attach("a", b"a")
        await new.text("a", "b")
        await old.cancel("a")
        await old.call.done_writing()
        await old.read()
        assert old.is_over
        work.emit("cd")
        work.finish()
        outcome = await new.outcome("a")
        assert (outcome.code, outcome.text) == (OK, "bcd")
        assert old.known("a").num_terminals == 0
    await rig.assert_nothing_left()


async def test_attach_to_what_is_not_there(rig: Rig) -> None:
    rig.backend.script = answering("abc")
    async with rig.open_session() as session:
        await session.start("a", text_request(), attach_offsets=[1])
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.reason) == (NOT_FOUND, "REQUEST_NOT_FOUND")
        await session.start("b", text_request(), attach_offsets=[0])
        assert (await session.outcome("b")).text == "abc"


async def test_offsets_beyond_the_answer(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request())
        work = await rig.backend.work()
        work.emit("ab")
        await session.text("a", "ab")
    for offsets, field in (([3], "attach_offsets[0]"), ([0, 0], "attach_offsets")):
        async with rig.open_session() as session:
            await session.start("a", attach_offsets=offsets)
            outcome = await session.outcome("a")
            assert (outcome.code, outcome.reason) == (INVALID, "INVALID_FIELD")
            assert field in outcome.violations
    assert not work.is_over


async def test_nobody_comes_back() -> None:
    async with running(session_grace_s=0.2) as rig:
        async with rig.open_session() as session:
            await session.start("a", text_request())
            work = await rig.backend.work()
            broken_at = time.monotonic()
            await lose(session, rig)
        await eventually(lambda: work.is_cancelled)
        assert time.monotonic() - broken_at >= 0.2
        assert rig.server.sessions.num_known == 0
        async with rig.open_session() as session:
            await session.start("a", attach_offsets=[1])
            assert (await session.outcome("a")).reason == "REQUEST_NOT_FOUND"
        await rig.assert_nothing_left()


async def test_a_grace_belongs_to_its_break() -> None:
    """A request that found a stream again is not ended by the grace of the break before."""
    async with running(session_grace_s=1.0) as rig:
        async with rig.open_session() as session:
            await session.start("a", text_request())
            work = await rig.backend.work()
            await lose(session, rig)
        await asyncio.sleep(0.1)
        async with rig.open_session() as session:
            await session.start("a", attach_offsets=[0])
            await eventually(lambda: rig.server.sessions.num_open == 1)
            work.emit("x")
            await session.text("a", "x")
            broken_at = time.monotonic()
            await lose(session, rig)
        await eventually(lambda: work.is_cancelled)
        assert time.monotonic() - broken_at >= 1.0


async def test_the_call_s_deadline_bounds_the_session_only(rig: Rig) -> None:
    for timeout in (0.2, 1.0, 5.0):  # the next one where it passed before the request had come to the router
        async with rig.open_session(timeout=timeout) as first:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await first.start("a", text_request())
            assert await first.call.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if rig.backend.works:
            break
    work = rig.backend.works[0]
    assert not work.is_over
    async with rig.open_session() as second:
        await second.start("a", attach_offsets=[0])
        work.emit("x")
        work.finish()
        assert (await second.outcome("a")).text == "x"


async def test_a_session_has_a_limit() -> None:
    async with running(max_session_requests=2) as rig, rig.open_session() as session:
        for request_id in ("a", "b", "c"):
            await session.start(request_id, text_request())
        refusal = await session.outcome("c")
        assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SESSION_LIMIT")
        (await rig.backend.work()).finish()
        await session.outcome("a")
        await session.start("d", text_request())
        (await rig.backend.work(2)).finish()
        assert (await session.outcome("d")).code == OK


async def test_a_flood_of_bad_starts_from_a_client_that_reads_later(rig: Rig) -> None:
    """Refusals wait in a bounded queue; the rest waits in the client's own buffers."""
    async with rig.open_session() as session:
        for _ in range(4):
            await session.send(starts=[pb.Start(request_id="") for _ in range(1_000)])
        await session.until(lambda: session.known("").num_terminals == 4_000)


async def test_a_message_has_a_bound() -> None:
    """A client takes 4 MiB: an attachment with long answers comes in pieces."""
    async with running() as rig, rig.open_session() as session:
        for i in range(4):
            await session.start(f"r{i}", text_request(), window=0)
        for i in range(4):
            work = await rig.backend.work(i)
            work.emit(b"x" * 30_000)
            work.finish()
        await session.send(grants=[pb.Grant(request_id=f"r{i}", tokens=30_000) for i in range(4)])
        for i in range(4):
            assert len((await session.outcome(f"r{i}")).text) == 30_000
        assert session.num_messages >= 4
