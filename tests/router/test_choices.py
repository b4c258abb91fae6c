"""Several choices of one request: each with its own deltas and finish, one terminal; and the best of more."""

from __future__ import annotations

import grpc
import pytest
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types

from tests.router.rig import ClientSession, Rig, Work, eventually, running, text_request
from workers.errors import DeadlineError, UnavailableError
from workers.types import FinishReason

OK = grpc.StatusCode.OK
LENGTH = types.Finish(reason=types.FINISH_REASON_LENGTH)


def three_answers(work: Work) -> None:
    work.dispatch(num_cached=1)
    for position in range(3):
        for index, text in enumerate(("abc", "ABC", "123")):
            work.emit(text[position], index)
    for index in (2, 0, 1):
        work.finish(index=index)


async def test_each_choice_has_its_text_and_its_finish(rig: Rig, way: str) -> None:
    rig.backend.script = three_answers
    outcome = await rig.run(way, text_request("hello", n=3))
    assert outcome.code == OK
    assert rig.backend.works[0].request.n == 3
    assert outcome.texts == ["abc", "ABC", "123"]
    assert [outcome.choice(index).finish for index in range(3)] == [LENGTH] * 3
    assert outcome.usage is not None
    assert (outcome.usage.prompt_tokens, outcome.usage.generated_tokens) == (5, 9)
    await rig.assert_nothing_left()


async def test_a_stop_string_ends_its_choice_only(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("one END of it", 1)
        for index in range(3):
            work.emit("more", index)
        work.finish(FinishReason.STOP, 101, index=0)
        work.finish(index=2)

    rig.backend.script = script
    outcome = await rig.run(way, text_request(n=3, stop=[" END"]))
    assert (outcome.code, outcome.texts) == (OK, ["more", "one", "more"])
    assert outcome.choice(1).finish == types.Finish(reason=types.FINISH_REASON_STOP, stop=" END")
    assert outcome.choice(0).finish == types.Finish(reason=types.FINISH_REASON_STOP, stop_token_id=101)
    work = rig.backend.works[0]
    assert (work.cancelled_choices, work.is_cancelled) == ([1], False)
    await rig.assert_nothing_left()


async def test_stop_strings_in_all_choices_end_the_work(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("a END", 1)
        work.emit("b END", 0)

    rig.backend.script = script
    outcome = await rig.run(way, text_request(n=2, stop=[" END"]))
    assert (outcome.code, outcome.texts) == (OK, ["b", "a"])
    work = rig.backend.works[0]
    assert (work.cancelled_choices, work.is_cancelled) == ([1], True)
    await rig.assert_nothing_left()


@pytest.mark.parametrize("error", [DeadlineError("late"), UnavailableError("lost")])
async def test_an_error_ends_all(rig: Rig, way: str, error: Exception) -> None:
    def script(work: Work) -> None:
        work.emit("a", 0)
        work.finish(index=0)
        work.emit("b", 1)
        work.end(error)  # type: ignore[arg-type]

    rig.backend.script = script
    outcome = await rig.run(way, text_request(n=2))
    assert (outcome.code.name, outcome.texts) == (error.code, ["a", "b"])  # type: ignore[attr-defined]
    assert outcome.choice(1).finish is None
    await rig.assert_nothing_left()


async def test_a_cancel_ends_all(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request(n=4))
        work = await rig.backend.work()
        work.emit("x", 3)
        await session.until(lambda: session.known("a").texts == ["", "", "", "x"])
        await session.cancel("a")
        assert (await session.outcome("a")).code == grpc.StatusCode.CANCELLED
        assert work.is_cancelled


async def test_a_window_counts_the_tokens_of_all_choices_and_starves_none(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request(n=2), window=3)
        work = await rig.backend.work()
        for index, text in enumerate(("abcdef", "ABCDEF")):
            work.emit(text, index)
            work.finish(index=index)
        await session.until(lambda: sum(map(len, session.known("a").texts)) == 3)
        await session.grant("a", 3)
        await session.until(lambda: sum(map(len, session.known("a").texts)) == 6)
        assert session.known("a").texts == ["abc", "ABC"]
        await session.grant("a", 6)
        assert (await session.outcome("a")).texts == ["abcdef", "ABCDEF"]


async def lose(session: ClientSession, rig: Rig) -> None:
    session.call.cancel()
    await eventually(lambda: rig.server.sessions.num_open == 0)


async def test_an_attachment_says_for_each_choice_what_is_there(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request(n=3))
        work = await rig.backend.work()
        for index, text in enumerate(("abc", "ABCDE", "")):
            work.emit(text, index)
        work.finish(index=0)
        await session.until(lambda: sum(map(len, session.known("a").texts)) == 8)
        await lose(session, rig)
    for offsets, field in (([0, 6, 0], "attach_offsets[1]"), ([0, 0], "attach_offsets"), ([1], "attach_offsets")):
        async with rig.open_session() as session:
            await session.start("a", attach_offsets=offsets)
            refusal = await session.outcome("a")
            assert (refusal.code, list(refusal.violations)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])
    async with rig.open_session() as session:
        await session.start("a", attach_offsets=[1, 5, 0])
        for index, have in ((0, b"a"), (1, b"ABCDE")):
            session.outcomes.setdefault("a", session.known("a")).choice(index).token_ids = list(have)
        session.outcomes["a"].num_terminals = 0
        work.emit("F", 1)
        work.emit("12", 2)
        for index in (1, 2):
            work.finish(index=index)
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.texts) == (OK, ["bc", "F", "12"])
    await rig.assert_nothing_left()


async def test_the_best_of_more_choices_come_at_the_end_and_in_order(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        for index, logprob in enumerate((-3.0, -1.0, -2.0, -9.0)):
            work.emit([ord("a") + index] * 2, index, logprob=logprob)
            work.finish(index=index)

    rig.backend.script = script
    outcome = await rig.run(way, text_request(n=2, best_of=4))
    assert (outcome.code, outcome.texts) == (OK, ["bb", "cc"])
    assert [outcome.choice(index).finish for index in range(2)] == [LENGTH] * 2
    assert outcome.logprobs == []
    assert outcome.usage is not None
    assert outcome.usage.generated_tokens == 8
    request = rig.backend.works[0].request
    assert (request.n, request.num_logprobs) == (4, 0)


async def test_the_sum_of_a_choice_ends_with_its_stop_string(rig: Rig, way: str) -> None:
    """What the engine generated behind it is no part of the answer; and equal sums keep their order."""

    def script(work: Work) -> None:
        work.emit("aXX", 0, logprob=-1.0)
        work.emit("b", 1, logprob=-1.5)
        work.emit("c", 2, logprob=-1.0)
        for index in (2, 1):
            work.finish(index=index)

    rig.backend.script = script
    outcome = await rig.run(way, text_request(n=3, best_of=3, stop=["a"]))
    assert outcome.texts == ["", "b", "c"]
    outcome = await rig.run(way, text_request(n=2, best_of=3, stop=["a"]))
    assert outcome.texts == ["", "c"]


async def test_best_of_shows_nothing_before_its_end(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request(best_of=2, logprobs=1))
        work = await rig.backend.work()
        work.emit("long", 0, logprob=-1.0)
        work.finish(index=0)
        await lose(session, rig)
    async with rig.open_session() as session:
        await session.start("a", attach_offsets=[0])
        work.emit("x", 1, logprob=-1.0)
        work.finish(index=1)
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.texts) == (OK, ["x"])
        assert [each.chosen.logprob for each in outcome.logprobs] == [-1.0]
    await rig.assert_nothing_left()


async def test_a_best_of_that_fails_shows_nothing(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("a", 0, logprob=-1.0)
        work.end(UnavailableError("lost"))

    rig.backend.script = script
    outcome = await rig.run(way, text_request(best_of=2))
    assert (outcome.code, outcome.texts) == (grpc.StatusCode.UNAVAILABLE, [""])


async def test_the_number_of_choices_has_a_limit(way: str) -> None:
    async with running(max_choices=4) as rig:
        for fields, field, words in (
            ({"n": 5}, "n", "must be in [1, 4], is 5"),
            ({"best_of": 5}, "best_of", "must be in [n = 1, 4], is 5"),
            ({"n": 3, "best_of": 2}, "best_of", "must be in [n = 3, 4], is 2"),
        ):
            outcome = await rig.run(way, text_request(**fields))
            assert (outcome.code, outcome.violations) == (grpc.StatusCode.INVALID_ARGUMENT, {field: words})
        assert rig.backend.works == []


async def test_a_request_with_its_choices_told_one_by_one(rig: Rig) -> None:
    """Over Generate: the first tokens of a choice do not wait for those of another."""
    call = rig.stub.Generate(text_request(n=2), timeout=10)
    work = await rig.backend.work()
    work.emit("a", 1)
    assert (await call.read()).deltas == [types.Delta(index=1, text="a", token_ids=b"a")]
    work.emit("b", 0)
    assert (await call.read()).deltas == [types.Delta(text="b", token_ids=b"b")]
    for index in (0, 1):
        work.finish(index=index)
    message: pb.GenerateResponse = await call.read()
    assert message.HasField("usage") or (await call.read()).HasField("usage")
