"""An answer that continues after tokens that the client has: as if it had never been interrupted."""

from __future__ import annotations

import grpc
import pytest
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types

from tests.router.rig import Rig, Work, eventually, text_request

OK = grpc.StatusCode.OK
TEXT = "é한🙂 the EN end"
TOKENS = TEXT.encode()


def after(token_ids: bytes, **fields: object) -> pb.GenerateRequest:
    received = [types.TokenIds(ids=token_ids)]
    return text_request("hi", received_token_ids=received, **fields)  # type: ignore[arg-type]


def going_on(work: Work) -> None:
    work.dispatch()
    for token in TOKENS[len(work.request.received) :]:
        work.emit([token], logprob=-1.0 if work.request.num_logprobs is not None else None)
    work.finish()


@pytest.mark.parametrize("way", ["generate", "session"])
async def test_every_cut_joins_to_the_whole(rig: Rig, way: str) -> None:
    """Also within a character, and where the beginning of a stop string is held back."""
    rig.backend.script = going_on
    pieces = [""]
    async with rig.open_session() as session:
        await session.start("whole", text_request("hi", stop=["END"]), window=0)
        for count in range(1, len(TOKENS) + 1):
            await session.grant("whole", 1)
            await session.until(lambda: len(session.known("whole").token_ids) == count)  # noqa: B023
            pieces.append(session.known("whole").text)
        await session.outcome("whole")
    for cut in range(len(TOKENS)):
        outcome = await rig.run(way, after(TOKENS[:cut], stop=["END"], logprobs=1))
        assert (outcome.code, pieces[cut] + outcome.text) == (OK, TEXT)
        assert bytes(outcome.token_ids) == TOKENS[cut:]
        assert len(outcome.logprobs) == len(TOKENS) - cut
        assert outcome.usage is not None
        assert (outcome.usage.prompt_tokens, outcome.usage.generated_tokens) == (2, len(TOKENS))
        assert bytes(rig.backend.works[-1].request.received) == TOKENS[:cut]
    await rig.assert_nothing_left()


async def test_a_stop_string_may_begin_in_what_was_received(rig: Rig, way: str) -> None:
    rig.backend.script = lambda work: work.emit("ND and more")
    outcome = await rig.run(way, after(b"the E", stop=["END"]))
    assert (outcome.code, outcome.text, outcome.token_ids) == (OK, "", list(b"ND"))
    assert outcome.finish == types.Finish(reason=types.FINISH_REASON_STOP, stop="END")


async def test_received_tokens_before_min_tokens_end_nothing(rig: Rig, way: str) -> None:
    rig.backend.script = lambda work: work.finish()
    outcome = await rig.run(way, after(b"xENDy!", stop=["END"], stop_token_ids=[ord("!")], min_tokens=6))
    assert outcome.code == OK
    assert rig.backend.works[0].request.min_tokens == 6


async def test_an_empty_list_is_a_beginning(rig: Rig, way: str) -> None:
    rig.backend.script = going_on
    assert (await rig.run(way, after(b""))).text == TEXT


async def test_an_attachment_counts_received_tokens(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", after(b"abc"))
        work = await rig.backend.work()
        work.emit("de")
        await session.text("a", "de")
        session.call.cancel()
        await eventually(lambda: rig.server.sessions.num_open == 0)
    for offset in (2, 6):
        async with rig.open_session() as session:
            await session.start("a", attach_offsets=[offset])
            refusal = await session.outcome("a")
            assert "must be in [3, 5]" in refusal.violations["attach_offsets[0]"]
    async with rig.open_session() as session:
        await session.attach("a", b"abcd")
        work.finish()
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.text) == (OK, "e")
    await rig.assert_nothing_left()


async def test_a_request_that_the_router_does_not_know_begins_with_what_was_received(rig: Rig) -> None:
    """As a client sends it that does not know whether its first Start has arrived."""
    rig.backend.script = going_on
    async with rig.open_session() as session:
        await session.start("a", after(TOKENS[:3]), attach_offsets=[3])
        assert bytes((await session.outcome("a")).token_ids) == TOKENS[3:]
        await session.start("b", after(TOKENS[:3]), attach_offsets=[4])
        assert (await session.outcome("b")).reason == "REQUEST_NOT_FOUND"
