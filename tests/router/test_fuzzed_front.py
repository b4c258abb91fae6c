"""Messages that nobody should send to a router's public port: each has a status of ours, and nothing is left.

The many are sent by `python -m load_tests.rigs.trust_fuzz`, of whose mutator these are a few; below them what was found
so, and by reading, on its own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types
from octavo.v1.model_service_pb2 import DetokenizeRequest, TokenizeRequest

from load_tests.rigs.fuzz_direct import Front
from load_tests.rigs.fuzz_local import InstantBackend, LocalContext
from load_tests.rigs.fuzz_public import PublicAttack, open_channel
from load_tests.rigs.fuzz_samples import NUMBERS, TEXTS, of_kind
from load_tests.rigs.fuzz_tally import FuzzTally
from load_tests.rigs.message_mutator import Mutator
from router.config import RouterConfig
from router.identity import Identities
from router.intake import Intake
from router.sessions import Sessions
from tests.router.rig import Rig, answering, eventually, running, served_model, text_request

SAMPLES = of_kind()
KINDS: tuple[type[Message], ...] = (pb.GenerateRequest, TokenizeRequest, DetokenizeRequest)
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_request_has_a_status_of_ours(runner: asyncio.Runner, seed: int) -> None:
    mutator, tally = Mutator(seed, texts=TEXTS, numbers=NUMBERS), FuzzTally()

    async def send() -> None:
        front = Front(tally)
        for kind in KINDS * 4:
            await front.take(kind, mutator.mutated(kind, SAMPLES[kind]))
        await front.hold_session([mutator.mutated(pb.SessionRequest, SAMPLES[pb.SessionRequest]) for _ in range(12)])
        assert await front.is_answered()
        await front.sessions.stop()
        await eventually(lambda: front.intake.num_open == 0)
        assert front.intake.num_accepted == front.intake.num_ended

    runner.run(send())
    assert tally.failures == []


async def test_every_call_over_sockets_has_a_status_of_ours() -> None:
    tally, mutator = FuzzTally(), Mutator(5, texts=(*TEXTS, "toy"), numbers=NUMBERS)
    async with running(session_grace_s=0.05) as rig, open_channel(rig.address) as channel:
        rig.backend.script = answering("ok")
        attack = PublicAttack(channel, mutator, SAMPLES, tally)
        await attack.call_unary(120)
        await attack.generate(60)
        await attack.watch(20)
        await attack.reflect(60)
        await attack.hold_sessions(150)
        assert tally.failures == []
        assert tally.num_messages > 350
        assert tally.codes["Session: OK"] + tally.codes["Session: CANCELLED"] + tally.codes["Session: INVALID_ARGUMENT"]
        await eventually(lambda: rig.server.intake.num_open == 0 and rig.server.sessions.num_open == 0)
        assert (await rig.generate(text_request())).text == "ok"


@pytest.mark.parametrize(
    "method", ["/grpc.health.v1.Health/Check", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"]
)
async def test_bytes_that_are_no_message_to_services_of_grpc(rig: Rig, method: str) -> None:
    """gRPC's own services answered UNKNOWN, with the text of the exception, and logged a trace of the stack."""
    call = rig.channel.stream_stream(method)(timeout=5)
    await call.write(b"\xff\xff\xff")
    with pytest.raises(grpc.aio.AioRpcError, match="not a valid protobuf"):
        await call.read()
    assert await call.code() is INVALID


async def test_health_is_watched_as_before(rig: Rig) -> None:
    call: Any = health_pb2_grpc.HealthStub(rig.channel).Watch(health_pb2.HealthCheckRequest(), timeout=5)
    assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
    await rig.server.health.set_serving(False)
    assert (await call.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    call.cancel()


async def test_a_long_trace_context_does_not_go_on_to_replicas(rig: Rig) -> None:
    """It was part of the message to the replica, which takes 64 MiB: a few requests with as much as a client may send
    broke the link, and with it the answers of all others."""
    rig.backend.script = answering("ok")
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    for size, kept in ((4_096, "x" * 4_096), (4_097, "")):
        outcome = await rig.session(text_request(), traceparent=parent, tracestate="x" * size)
        assert outcome.code is grpc.StatusCode.OK
        assert rig.backend.works[-1].request.tracestate == kept


async def test_the_id_of_a_refused_start_is_not_repeated_at_any_length(rig: Rig) -> None:
    """A thousand refusals may wait for a client that does not read, with ids of as many MiB as a message has."""
    async with rig.open_session() as session:
        await session.start("x" * 1_000_000, text_request())
        outcome = await session.outcome("x" * 1_024)
        assert (outcome.code, outcome.violations.keys()) == (INVALID, {"request_id"})


async def test_attach_offsets_are_no_more_than_choices(rig: Rig) -> None:
    """Sixteen million zeros kept everybody else waiting for seconds."""
    rig.backend.script = answering("ok")
    async with rig.open_session() as session:
        await session.start("a", text_request(max_tokens=0))
        await session.outcome("a")
        for number, code in ((16, INVALID), (17, INVALID)):
            session.outcomes.clear()
            await session.start("a", text_request(), attach_offsets=[0] * number)
            outcome = await session.outcome("a")
            assert outcome.code is code
        assert outcome.violations == {"attach_offsets": "must have at most 16 numbers, has 17"}


async def test_a_message_of_a_million_cancels_lets_others_have_their_turn() -> None:
    """Starts of one message went out in turns of a few milliseconds, cancels and grants all at once."""
    intake = Intake(RouterConfig(), {"toy": served_model()}, InstantBackend(), router_id="r")
    sessions, longest, last = Sessions(intake, Identities()), 0.0, time.monotonic()
    many = pb.SessionRequest(cancels=[pb.Cancel()] * 300_000, grants=[pb.Grant()] * 300_000)
    serving = asyncio.create_task(sessions.serve(LocalContext([many])))  # type: ignore[arg-type]
    num_turns = 0
    while not serving.done():
        await asyncio.sleep(0)
        num_turns += 1
        longest, last = max(longest, time.monotonic() - last), time.monotonic()
    assert num_turns > 5, longest
    await sessions.stop()


class GatedContext(LocalContext):
    """A call whose messages come when the test says so, and whose writes wait at a gate from the one that brings
    terminal number `from_terminal`."""

    def __init__(self, from_terminal: int = 1) -> None:
        super().__init__()
        self.incoming: asyncio.Queue[object] = asyncio.Queue()
        self.gate = asyncio.Event()
        self._from_terminal = from_terminal

    async def read(self) -> object:
        return await self.incoming.get()

    async def write(self, message: Any) -> None:
        self.written.append(message)
        if len(self.terminals()) >= self._from_terminal:
            await self.gate.wait()

    def terminals(self) -> list[tuple[str, str]]:
        events = [event for message in self.written for event in message.events if event.HasField("terminal")]
        return [(event.request_id, event.terminal.reason) for event in events]


async def many_turns() -> None:
    """Let everybody do what they have to, who wait for nothing but their turn."""
    for _ in range(100):
        await asyncio.sleep(0)


async def test_an_answer_that_is_attached_to_while_its_terminal_is_written_is_live() -> None:
    """It was then taken for one whose terminal had been told, so that its id could be used again while it was there.
    The end of the one took the other one's place away, and the next token for that was a KeyError in the middle of what
    a replica said, which broke its link."""
    backend, context = InstantBackend(), GatedContext()
    intake = Intake(RouterConfig(), {"toy": served_model()}, backend, router_id="r")
    sessions, problems = Sessions(intake, Identities()), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, problem: problems.append(problem))
    serving = asyncio.create_task(sessions.serve(context))  # type: ignore[arg-type]
    prompt = types.Prompt(token_ids=types.TokenIds(ids=[1, 2]))
    request = pb.GenerateRequest(prompt=prompt, max_tokens=3)
    start = pb.SessionRequest(starts=[pb.Start(request_id="a", request=request)])
    context.incoming.put_nowait(start)
    await eventually(lambda: bool(context.terminals()))
    attach = pb.Start(request_id="a", request=request, attach_offsets=[3])
    context.incoming.put_nowait(pb.SessionRequest(starts=[attach]))
    await many_turns()
    context.gate.set()
    context.incoming.put_nowait(start)
    context.incoming.put_nowait(grpc.aio.EOF)
    async with asyncio.timeout(5):
        await serving
    assert problems == []
    assert ("a", Reason.REQUEST_ID_IN_USE) in context.terminals()
    assert len(context.terminals()) == 3
    await sessions.stop()
    assert intake.num_open == 0


async def test_an_id_is_free_as_soon_as_the_client_may_have_its_terminal() -> None:
    """A client that closed its stream with the Terminal, and used the id again over the next one, or that was quick to
    use it over the same one, was told that it is in use: the write of the Terminal had yet to return."""
    context, next_context = GatedContext(from_terminal=2), GatedContext()
    intake = Intake(RouterConfig(), {"toy": served_model()}, InstantBackend(), router_id="r")
    sessions = Sessions(intake, Identities())
    prompt = types.Prompt(token_ids=types.TokenIds(ids=[1, 2]))
    starts = [pb.Start(request_id=name, request=pb.GenerateRequest(prompt=prompt, max_tokens=3)) for name in "ab"]
    serving = asyncio.create_task(sessions.serve(context))  # type: ignore[arg-type]
    context.incoming.put_nowait(pb.SessionRequest(starts=starts))
    await eventually(lambda: len(context.terminals()) == 2)
    context.incoming.put_nowait(pb.SessionRequest(starts=starts[:1]))
    await many_turns()
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    next_context.gate.set()
    next_context.incoming.put_nowait(pb.SessionRequest(starts=starts[1:]))
    serving = asyncio.create_task(sessions.serve(next_context))  # type: ignore[arg-type]
    await eventually(lambda: len(next_context.terminals()) == 1)
    assert next_context.terminals() == [("b", "")]
    assert intake.num_accepted == 4
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    await sessions.stop()
    assert intake.num_open == 0
