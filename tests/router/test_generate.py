"""One request over Generate: its stream, its end, and what becomes of it when the client goes or is slow."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types

from router.servicer import MAX_FIRST_BYTES, InferenceServicer
from tests.router.rig import (
    END,
    PATIENCE_S,
    Rig,
    Work,
    answering,
    eventually,
    read_generate,
    running,
    text_request,
)
from workers.errors import DeadlineError, OctavoError, UnavailableError
from workers.types import FinishReason


async def test_an_answer(rig: Rig, way: str) -> None:
    rig.backend.script = answering("Grüße, 서울 🙂")
    outcome = await rig.run(way, text_request("hello"))
    assert outcome.code == grpc.StatusCode.OK
    assert outcome.text == "Grüße, 서울 🙂"
    assert bytes(outcome.token_ids).decode() == outcome.text
    assert outcome.finish == types.Finish(reason=types.FINISH_REASON_LENGTH)
    assert outcome.usage is not None
    assert outcome.decision is not None
    usage = outcome.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens) == (5, 1, len(outcome.token_ids))
    assert (usage.queue_s, usage.prefill_s, usage.decode_s, usage.replica) == (0.75, 1.0, 2.0, "r1")
    assert (outcome.decision.rule, outcome.decision.attempt, outcome.decision.candidates[0].cost) == ("only", 1, 3.0)
    await rig.assert_nothing_left()


async def test_trailers(rig: Rig) -> None:
    rig.backend.script = answering("x")
    outcome = await rig.generate(text_request(client_request_id="mine"))
    expected = {"octavo-replica": "r1", "octavo-cached-tokens": "1", "octavo-request-id": "mine"}
    assert expected.items() <= outcome.trailers.items()
    outcome = await rig.generate(text_request(client_request_id="é\n"))
    assert outcome.code == grpc.StatusCode.OK
    assert "octavo-request-id" not in outcome.trailers


async def test_an_end_token_has_no_text_and_is_named(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("hi")
        work.emit([END])
        work.finish(FinishReason.STOP, END)

    rig.backend.script = script
    outcome = await rig.run(way, text_request())
    assert outcome.text == "hi"
    assert outcome.token_ids == [*b"hi", END]
    assert outcome.finish == types.Finish(reason=types.FINISH_REASON_STOP, stop_token_id=END)


async def test_a_stop_token_of_the_request_has_no_text(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("hi!")
        work.finish(FinishReason.STOP, ord("!"))

    rig.backend.script = script
    outcome = await rig.run(way, text_request(stop_token_ids=[ord("!")]))
    assert (outcome.text, outcome.token_ids) == ("hi", list(b"hi!"))


async def test_a_stop_string_ends_the_engine_s_work(rig: Rig, way: str) -> None:
    """Found across tokens; the text ends before it, the tokens with it; what came in the same step is dropped."""
    rig.backend.script = lambda work: work.emit("one two STOP three")
    outcome = await rig.run(way, text_request(stop=["nothing", " STOP"]))
    assert outcome.code == grpc.StatusCode.OK
    assert outcome.text == "one two"
    assert outcome.token_ids == list(b"one two STOP")
    assert outcome.finish == types.Finish(reason=types.FINISH_REASON_STOP, stop=" STOP")
    assert rig.backend.works[0].is_cancelled
    await rig.assert_nothing_left()


async def test_what_a_stop_string_held_back_comes_at_the_end(rig: Rig, way: str) -> None:
    rig.backend.script = answering("one ST")
    outcome = await rig.run(way, text_request(stop=["STOP"]))
    assert outcome.text == "one ST"
    assert outcome.finish == types.Finish(reason=types.FINISH_REASON_LENGTH)


async def test_the_first_token_comes_at_once_and_later_ones_together(rig: Rig) -> None:
    call = rig.stub.Generate(text_request(), timeout=10)
    work = await rig.backend.work()
    work.emit("a")
    assert (await call.read()).deltas == [types.Delta(text="a", token_ids=b"a")]
    for token in "bcd":
        work.emit(token)
    assert (await call.read()).deltas == [types.Delta(text="bcd", token_ids=b"bcd", token_offset=1)]
    work.finish()
    last = await call.read()
    assert [delta.finish.reason for delta in last.deltas] == [types.FINISH_REASON_LENGTH]
    assert last.HasField("usage")
    assert await call.code() == grpc.StatusCode.OK


async def test_errors_of_the_back(rig: Rig, way: str) -> None:
    def script(work: Work) -> None:
        work.emit("some")
        work.end(UnavailableError("replica r1 is gone", reason="REPLICA_LOST"))

    rig.backend.script = script
    outcome = await rig.run(way, text_request())
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "REPLICA_LOST")
    assert (outcome.text, outcome.message) == ("some", "replica r1 is gone")
    assert outcome.finish is None


async def test_no_stack_trace_reaches_a_client(rig: Rig, way: str) -> None:
    rig.backend.script = lambda work: work.end(OctavoError("Traceback (most recent call last):\n  File ..."))
    outcome = await rig.run(way, text_request())
    assert (outcome.code, outcome.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert "Traceback" not in outcome.message


async def test_an_end_without_a_finish_is_our_failure(rig: Rig, way: str) -> None:
    rig.backend.script = lambda work: work.end(None)
    assert (await rig.run(way, text_request())).code == grpc.StatusCode.INTERNAL


async def test_a_client_that_leaves_frees_the_engine(rig: Rig) -> None:
    call = rig.stub.Generate(text_request(), timeout=10)
    work = await rig.backend.work()
    work.emit("a")
    await call.read()
    call.cancel()
    await eventually(lambda: work.is_cancelled)
    await rig.assert_nothing_left()


async def test_a_call_s_deadline_frees_the_engine(rig: Rig) -> None:
    for timeout in (0.2, 1.0, 5.0):  # the next one where it passed before the call had come to the router
        outcome = await rig.generate(text_request(), timeout=timeout)
        assert outcome.code == grpc.StatusCode.DEADLINE_EXCEEDED
        if rig.backend.works:
            break
    await eventually(lambda: rig.backend.works[0].is_cancelled)
    await rig.assert_nothing_left()


async def test_the_router_s_own_deadline(way: str) -> None:
    async with running(default_timeout_s=0.1) as rig:
        request = text_request()
        if way == "generate":
            outcome = await read_generate(rig.stub.Generate(request))
        else:
            outcome = await rig.session(request)
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_PASSED")
        assert rig.backend.works[0].is_cancelled
        await rig.assert_nothing_left()


async def test_the_deadline_reaches_the_back(rig: Rig, way: str) -> None:
    """The back knows the deadline and may be the one who tells that it passed."""
    rig.backend.script = lambda work: work.end(DeadlineError("expired in the queue"))
    before = time.monotonic()
    outcome = await rig.run(way, text_request())
    assert (outcome.code, outcome.message) == (grpc.StatusCode.DEADLINE_EXCEEDED, "expired in the queue")
    expected, rounding = (10, 0.1) if way == "generate" else (600, 0.0)  # gRPC has tenths of a second from 10 on
    deadline = rig.backend.works[0].request.deadline
    assert before + expected - 0.5 < deadline < time.monotonic() + expected + rounding


async def test_a_client_that_never_reads_a_call() -> None:
    """Its window is full, the write stands still: after a while the engine's work ends, and the call with a reason."""
    async with running(slow_consumer_s=0.3) as rig:
        call = rig.stub.Generate(text_request(), timeout=20)
        work = await rig.backend.work()

        async def emit_for_ever() -> None:
            while not work.is_over:
                work.emit(b"x" * 3_000)
                await asyncio.sleep(0.005)

        await asyncio.wait_for(emit_for_ever(), PATIENCE_S)
        assert work.is_cancelled
        outcome = await read_generate(call)
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_CONSUMER")
        assert outcome.token_ids
        await rig.assert_nothing_left()


async def test_an_answer_larger_than_a_message_comes_in_several(rig: Rig) -> None:
    call = rig.stub.Generate(pb.GenerateRequest(prompt=text_request().prompt), timeout=20)
    work = await rig.backend.work()
    work.emit(b"x" * 100_000)
    work.finish()
    outcome = await read_generate(call)
    assert outcome.code == grpc.StatusCode.OK
    assert outcome.text == "x" * 100_000


async def test_a_client_that_reads_the_last_message_late_gets_all_of_it() -> None:
    """The status goes with the last message: a full window holds up both, and nothing of the request but them."""
    async with running(slow_consumer_s=0.3) as rig:
        call = rig.stub.Generate(pb.GenerateRequest(prompt=text_request().prompt), timeout=20)
        work = await rig.backend.work()
        work.emit(b"x" * 5_000)
        work.finish()
        await rig.assert_nothing_left()
        await asyncio.sleep(1.0)
        outcome = await read_generate(call)
        assert (outcome.code, outcome.text) == (grpc.StatusCode.OK, "x" * 5_000)


async def test_a_client_that_does_not_read_the_large_end_of_an_answer_is_cut_off() -> None:
    async with running(slow_consumer_s=0.3) as rig:
        call = rig.stub.Generate(pb.GenerateRequest(prompt=text_request().prompt), timeout=20)
        work = await rig.backend.work()
        work.emit(b"x" * 200_000)
        work.finish()
        await rig.assert_nothing_left()
        outcome = await read_generate(call)
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.SLOW_CONSUMER)


class Call:
    """A Generate call as its handler sees it; notes what the handler sends apart from its last message."""

    def __init__(self, on_message: Callable[[], None]) -> None:
        self.sent: list[object] = []
        self._on_message = on_message

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def time_remaining(self) -> float | None:
        return None

    def set_trailing_metadata(self, trailers: object) -> None:
        pass

    async def send_initial_metadata(self, metadata: tuple[object, ...]) -> None:
        self.sent.append(metadata)

    async def write(self, message: bytes) -> None:
        self.sent.append(pb.GenerateResponse.FromString(message))
        self._on_message()


async def serve(
    rig: Rig, script: Any, *, on_message: Callable[[], None] = lambda: None
) -> tuple[list[Any], pb.GenerateResponse]:
    """Return what a handler sends apart from its last message, and that. `on_message`: what happens when it has sent
    such a message."""
    rig.backend.script = script
    call: Any = Call(on_message)
    intake, sessions = rig.server.intake, rig.server.sessions
    servicer = InferenceServicer(intake, sessions)
    last = await servicer.Generate(pb.GenerateRequest(prompt=text_request().prompt), call)
    return call.sent, pb.GenerateResponse.FromString(last)


async def test_a_short_answer_is_its_last_message(rig: Rig) -> None:
    """So that gRPC sends it with initial metadata and status at once."""
    sent, last = await serve(rig, answering("x"))
    assert not sent
    assert last.deltas[0].text == "x"
    assert last.deltas[0].HasField("finish")
    assert last.HasField("usage")


async def test_only_a_large_first_message_goes_apart_from_the_initial_metadata(rig: Rig) -> None:
    def script(size: int) -> Any:
        def begin(work: Work) -> None:
            work.emit(b"x" * size)

        return begin

    def finish() -> None:
        rig.backend.works[-1].finish()

    sent, last = await serve(rig, script(1), on_message=finish)
    assert [message.deltas[0].text for message in sent] == ["x"]
    assert last.deltas[0].HasField("finish")
    sent, _ = await serve(rig, script(MAX_FIRST_BYTES), on_message=finish)
    assert sent[0] == ()
    assert [message.deltas[0].text for message in sent[1:]] == ["x" * MAX_FIRST_BYTES]
