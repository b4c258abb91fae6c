"""An answer that continues after tokens that the client has: as if it had never been interrupted."""

from __future__ import annotations

import random

import grpc
import pytest
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types

from router.received import MAX_KEPT_CHARACTERS, stop_strings
from tests.router.rig import Rig, Work, eventually, text_request

OK = grpc.StatusCode.OK
TEXT = "é한🙂 the EN end"
TOKENS = TEXT.encode()


def after(*lists: bytes, **fields: object) -> pb.GenerateRequest:
    received = [types.TokenIds(ids=token_ids) for token_ids in lists]
    return text_request("hi", received_token_ids=received, **fields)  # type: ignore[arg-type]


def going_on(work: Work) -> None:
    work.dispatch()
    num_received = len(work.request.received[0]) if work.request.received else 0
    for token in TOKENS[num_received:]:
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
        assert [bytes(each) for each in rig.backend.works[-1].request.received] == [TOKENS[:cut]] * bool(cut)
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


@pytest.mark.parametrize("is_broken", [True, False])
async def test_an_answer_that_went_on_elsewhere_is_not_mixed_with_this_router_s(rig: Rig, is_broken: bool) -> None:
    """The client had a token from here and others from another router, which was lost. What had been generated here
    meanwhile was put behind those. (Also while the old stream does not know yet that it is dead.)"""
    async with rig.open_session() as old:
        await old.start("a", text_request())
        stale = await rig.backend.work()
        stale.emit("abcdef")
        await old.text("a", "abcdef")
        if is_broken:
            old.call.cancel()
            await eventually(lambda: rig.server.sessions.num_open == 0)
        async with rig.open_session() as session:
            await session.start("a", after(b"axy"), attach_offsets=[3])
            work = await rig.backend.work(1)
            assert stale.is_cancelled
            assert [bytes(each) for each in work.request.received] == [b"axy"]
            work.emit("z")
            work.finish()
            outcome = await session.outcome("a")
            assert (outcome.code, outcome.text) == (OK, "z")
            assert old.known("a").num_terminals == 0
    await rig.assert_nothing_left()


ANSWERS = (TOKENS, b"second EN", b"3rd one: of three")


def all_going_on(work: Work) -> None:
    """Each choice after its own tokens, a token of each in turn, to its end."""
    work.dispatch()
    received = work.request.received or [()] * len(ANSWERS)
    left = [list(answer[len(had) :]) for answer, had in zip(ANSWERS, received, strict=True)]
    while any(left):
        for index, tokens in enumerate(left):
            if tokens:
                work.emit([tokens.pop(0)], index, logprob=-1.0 if work.request.num_logprobs is not None else None)
    for index in range(len(ANSWERS)):
        work.finish(index=index)


@pytest.mark.parametrize("seed", range(8))
async def test_each_choice_goes_on_after_its_own_tokens(rig: Rig, way: str, seed: int) -> None:
    """Cut anywhere, each elsewhere: tokens, text and finish are those of the undisturbed answer."""
    rig.backend.script = all_going_on
    rng = random.Random(seed)
    whole = await rig.run(way, text_request("hi", n=3, stop=["END", "of"]))
    lists = [bytes(whole.choice(i).token_ids) for i in range(3)]
    cuts = [rng.randrange(len(tokens)) for tokens in lists]
    received = [tokens[:cut] for tokens, cut in zip(lists, cuts, strict=True)]
    rest = await rig.run(way, after(*received, n=3, stop=["END", "of"], logprobs=0))
    assert rest.code == OK
    for i, (cut, tokens) in enumerate(zip(cuts, lists, strict=True)):
        choice, before = rest.choice(i), whole.choice(i)
        assert bytes(choice.token_ids) == tokens[cut:]
        assert before.text.endswith(choice.text)
        assert choice.finish == before.finish
        assert len(choice.logprobs) == len(tokens) - cut
    assert rest.usage is not None
    assert rest.usage.generated_tokens == sum(map(len, lists))
    assert [bytes(each) for each in rig.backend.works[-1].request.received] == received
    await rig.assert_nothing_left()


STOP, LENGTH = types.FINISH_REASON_STOP, types.FINISH_REASON_LENGTH
ENDED = [
    (b"one END", types.Finish(reason=STOP, stop="END"), ""),
    (b"two!", types.Finish(reason=STOP, stop_token_id=ord("!")), ""),
    (b"12345678 E", types.Finish(reason=LENGTH), "E"),
    (b"12345678 \xe9", types.Finish(reason=LENGTH), "\N{REPLACEMENT CHARACTER}"),
]
"""What was received, the finish that its last token brings, and the text that was held back to the end."""


@pytest.mark.parametrize(("received", "finish", "tail"), ENDED)
async def test_a_choice_that_had_ended_sends_its_finish_and_is_not_generated(
    rig: Rig, way: str, received: bytes, finish: types.Finish, tail: str
) -> None:
    """Its client may have lost the finish together with the router."""

    def script(work: Work) -> None:
        work.dispatch()
        work.emit("never", 0)
        work.emit("more", 1)
        work.finish(index=1)

    rig.backend.script = script
    outcome = await rig.run(
        way, after(received, b"some ", n=2, stop=["END"], stop_token_ids=[ord("!")], max_tokens=10, min_tokens=2)
    )
    assert (outcome.code, outcome.texts) == (OK, [tail, "more"])
    assert (outcome.token_ids, outcome.finish) == ([], finish)
    assert outcome.choice(1).finish == types.Finish(reason=LENGTH)
    assert rig.backend.works[0].cancelled_choices == [0]
    await rig.assert_nothing_left()


async def test_an_answer_that_had_ended_needs_no_replica(rig: Rig, way: str) -> None:
    outcome = await rig.run(way, after(b"aEND", b"b!", n=2, stop=["END"], stop_token_ids=[ord("!")]))
    assert (outcome.code, outcome.texts) == (OK, ["", ""])
    assert outcome.finish == types.Finish(reason=STOP, stop="END")
    assert outcome.choice(1).finish == types.Finish(reason=STOP, stop_token_id=ord("!"))
    assert outcome.usage is not None
    assert (outcome.usage.generated_tokens, outcome.usage.decode_s) == (6, 0.0)
    await rig.assert_nothing_left()


async def test_a_long_answer_is_looked_through_in_a_thread(rig: Rig, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.received.MAX_INLINE_RECEIVED", 8)
    monkeypatch.setattr("router.validation.MAX_INLINE_RECEIVED", 8)
    rig.backend.script = all_going_on
    received = [answer[:4] for answer in ANSWERS]
    outcome = await rig.run(way, after(*received, n=3))
    assert [bytes(outcome.choice(i).token_ids) for i in range(3)] == [answer[4:] for answer in ANSWERS]


async def test_an_attachment_counts_the_received_tokens_of_each_choice(rig: Rig) -> None:
    async with rig.open_session() as session:
        await session.start("a", after(b"abc", b"", n=2))
        work = await rig.backend.work()
        work.emit("de", 0)
        work.emit("A", 1)
        await session.until(lambda: session.known("a").texts == ["de", "A"])
        session.call.cancel()
        await eventually(lambda: rig.server.sessions.num_open == 0)
    for offsets, field, words in (([2, 0], 0, "must be in [3, 5]"), ([3, 2], 1, "must be in [0, 1]")):
        async with rig.open_session() as session:
            await session.start("a", attach_offsets=offsets)
            assert words in (await session.outcome("a")).violations[f"attach_offsets[{field}]"]
    async with rig.open_session() as session:
        await session.start("a", after(b"abcd", b"", n=2), attach_offsets=[4, 0])
        for index in range(2):
            work.finish(index=index)
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.texts) == (OK, ["e", "A"])
    await rig.assert_nothing_left()


def test_stop_strings_are_prepared_once_unless_they_are_long() -> None:
    stops, long = ("one", "two"), ("x" * (MAX_KEPT_CHARACTERS + 1),)
    assert stop_strings(stops) is stop_strings(("one", "two"))
    assert stop_strings(stops) is not stop_strings(("two", "one"))
    assert stop_strings(long) is not stop_strings(long)
    assert stop_strings(long).scan(0, long[0])[2] == long[0]
