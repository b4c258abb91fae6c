"""Log probabilities, logit bias and min_tokens: what reaches the back, and what comes of it."""

from __future__ import annotations

import grpc
import pytest
from octavo.names import Reason
from octavo.v1 import types_pb2 as types

from tests.router.rig import Rig, Script, Work, answering, eventually, running, text_request
from workers.errors import CapabilityError, Violation
from workers.types import FinishReason, TokenLogprobs

OK = grpc.StatusCode.OK


def emitting(text: str) -> Script:
    def script(work: Work) -> None:
        for i, character in enumerate(text):
            work.emit(character, logprob=-float(i))
        work.finish()

    return script


async def test_each_token_comes_with_its_log_probability(rig: Rig, way: str) -> None:
    rig.backend.script = emitting("abc")
    outcome = await rig.run(way, text_request(logprobs=2))
    assert outcome.code == OK
    assert rig.backend.works[0].request.num_logprobs == 2
    assert outcome.logprobs == [
        types.TokenLogprobs(
            chosen=types.Logprob(token_id=token, logprob=-float(i)),
            top=[types.Logprob(token_id=token, logprob=-float(i)), types.Logprob(token_id=0, logprob=-9.0)],
        )
        for i, token in enumerate(b"abc")
    ]


async def test_without_the_field_there_are_none(rig: Rig, way: str) -> None:
    rig.backend.script = answering("abc")
    assert (await rig.run(way, text_request())).logprobs == []
    assert rig.backend.works[0].request.num_logprobs is None


async def test_tokens_behind_a_stop_string_take_theirs_along(rig: Rig, way: str) -> None:
    rig.backend.script = lambda work: work.emit("ab END cd", logprob=-1.0)
    outcome = await rig.run(way, text_request(stop=[" END"], logprobs=0))
    assert outcome.token_ids == list(b"ab END")
    assert len(outcome.logprobs) == 6


async def test_an_attachment_gets_those_of_its_tokens(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", text_request(logprobs=1))
        work = await rig.backend.work()
        for i, character in enumerate("abcd"):
            work.emit(character, logprob=-float(i))
        await session.text("a", "abcd")
        session.call.cancel()
        await eventually(lambda: rig.server.sessions.num_open == 0)
    for cut in range(5):
        async with rig.open_session() as session:
            await session.attach("a", b"abcd"[:cut])
            await eventually(lambda: rig.server.sessions.num_open == 1)
            if cut < 4:
                await session.text("a", "abcd"[cut:])
                assert [each.chosen.logprob for each in session.known("a").logprobs] == [
                    -float(i) for i in range(cut, 4)
                ]
            session.call.cancel()
            await eventually(lambda: rig.server.sessions.num_open == 0)


async def test_a_replica_that_forgets_them_is_as_good_as_lost(rig: Rig, way: str) -> None:
    """It was INTERNAL, which no message of anybody may lead to."""
    rig.backend.script = answering("abc")
    outcome = await rig.run(way, text_request(logprobs=1))
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, Reason.REPLICA_LOST)
    await rig.assert_nothing_left()


async def test_an_engine_that_has_none(rig: Rig, way: str) -> None:
    violations = [Violation("logprobs", "no replica of this model has an engine with the capability 'logprobs'")]
    rig.backend.refusal = CapabilityError("no", violations=violations)
    outcome = await rig.run(way, text_request(logprobs=1))
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ENGINE_CAPABILITY")
    assert outcome.violations == dict(violations)


async def test_long_answers_with_many_come_in_messages_that_a_client_takes(way: str) -> None:
    """20 alternatives of 30,000 tokens are 9 MB, and a client takes 4 MiB a message."""

    def script(work: Work) -> None:
        top = tuple((200_000 + i, -float(i)) for i in range(20))
        work.sink.tokens(0, [65] * 30_000, [TokenLogprobs(-1.0, top)] * 30_000)
        work.finish()

    async with running() as rig:
        rig.backend.script = script
        outcome = await rig.run(way, text_request(logprobs=20))
        assert (outcome.code, len(outcome.logprobs)) == (OK, 30_000)


async def test_a_bias_reaches_the_back(rig: Rig, way: str) -> None:
    rig.backend.script = answering("x")
    bias = {5: 1.5, 6: -100.0, 259: 100.0}
    outcome = await rig.run(way, text_request(min_tokens=3, max_tokens=9, sampling=types.Sampling(logit_bias=bias)))
    assert outcome.code == OK
    request = rig.backend.works[0].request
    assert (dict(request.sampling.logit_bias), request.min_tokens) == (bias, 3)


@pytest.mark.parametrize(
    ("text", "min_tokens", "expected"),
    [
        ("aENDbENDc", 3, "a"),
        ("aENDbENDc", 4, "aENDb"),
        ("aENDb", 4, "aENDb"),
        ("aENDb", 5, "aENDb"),
        ("aEND", 3, "a"),
        ("ENDEND", 2, ""),
        ("ENDEND", 5, "END"),
        ("ENENDx", 4, "EN"),
        ("ENENDx", 5, "ENENDx"),
    ],
)
async def test_a_stop_string_counts_when_it_ends_behind_min_tokens(
    rig: Rig, way: str, text: str, min_tokens: int, expected: str
) -> None:
    """As in vLLM: it may begin before. "aEND" has its last token as the fourth."""
    rig.backend.script = answering(text)
    outcome = await rig.run(way, text_request(stop=["END"], min_tokens=min_tokens))
    assert (outcome.code, outcome.text) == (OK, expected)


async def test_a_stop_token_that_does_not_count_has_its_text(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("a!b!")
        work.finish(FinishReason.STOP, ord("!"))

    rig.backend.script = script
    outcome = await rig.run(way, text_request(stop_token_ids=[ord("!")], min_tokens=3))
    assert outcome.text == "a!b"
