"""Attacks a router's public port over sockets: every call of every service, with messages of the mutator.

Sends bytes as they are, since most of them are no messages that stubs would send. A status other than INTERNAL and
UNKNOWN is an answer; which one it should be is for the tests of single rules.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub
from octavo.v1.model_service_pb2 import DetokenizeRequest, ListModelsRequest, TokenizeRequest
from octavo.v1.status_service_pb2 import GetRequestRecordRequest, GetStatusRequest, ListRequestRecordsRequest
from octavo.v1.types_pb2 import Prompt, TokenIds

from load_tests.rigs.fuzz_tally import FuzzTally, name_of, status_of
from load_tests.rigs.message_mutator import Mutator, parsed
from load_tests.rigs.router_model import VOCAB_SIZE
from router import status
from workers.fake import fake_continuation

UNARY: Final = (
    ("/octavo.v1.ModelService/Tokenize", TokenizeRequest, 30),
    ("/octavo.v1.ModelService/Detokenize", DetokenizeRequest, 30),
    ("/octavo.v1.ModelService/ListModels", ListModelsRequest, 5),
    ("/octavo.v1.StatusService/GetStatus", GetStatusRequest, 5),
    ("/octavo.v1.StatusService/GetRequestRecord", GetRequestRecordRequest, 5),
    ("/octavo.v1.StatusService/ListRequestRecords", ListRequestRecordsRequest, 5),
    ("/grpc.health.v1.Health/Check", HealthCheckRequest, 30),
)
"""With their shares of the calls."""
GENERATE: Final = "/octavo.v1.InferenceService/Generate"
SESSION: Final = "/octavo.v1.InferenceService/Session"
WATCH: Final = "/grpc.health.v1.Health/Watch"
REFLECTION: Final = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
OF_HOSTILE: Final = "answers beside hostile replicas"
IN_FLIGHT: Final = 24
SESSIONS: Final = 12
PART_S: Final = 60.0
"""How long streams may take for what they are to send; the other end may be gone."""
CALL_S: Final = 3.0
SESSION_S: Final = 0.3
"""How long a Session that all was said on is waited for; many wait for grants that never come."""
MAX_SESSION_MESSAGES: Final = 60
MANGLED: Final = 0.03
"""Of the messages of a stream so many may be none at all, which ends it."""
GOOD_S: Final = 30.0
OPTIONS: Final = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


@asynccontextmanager
async def open_channel(address: str) -> AsyncIterator[grpc.aio.Channel]:
    """A connection of its own."""
    options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield channel


async def is_answered(channel: grpc.aio.Channel, rng: random.Random) -> str:
    """Send a good request; return what is wrong with its answer, empty for nothing."""
    prompt = [rng.randrange(300, VOCAB_SIZE) for _ in range(20)]
    request = pb.GenerateRequest(prompt=Prompt(token_ids=TokenIds(ids=prompt)), max_tokens=6, ignore_eos=True)
    tokens: list[int] = []
    try:
        async for response in InferenceServiceStub(channel).Generate(request, timeout=GOOD_S):
            for delta in response.deltas:
                tokens += delta.token_ids
    except grpc.aio.AioRpcError as error:
        return f"{error.code().name}: {error.details()}"
    expected = fake_continuation(prompt, 6, VOCAB_SIZE)
    return "" if tokens == expected else f"its tokens should be {expected}, are {tokens}"


class PublicAttack:
    """Over `channel`, in turns that the caller makes; everything is counted in `tally`."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        mutator: Mutator,
        samples: Mapping[type[Message], Sequence[bytes]],
        tally: FuzzTally,
    ) -> None:
        self._channel = channel
        self._mutator = mutator
        self._samples = samples
        self._tally = tally

    async def call_unary(self, number: int) -> None:
        shares = [share for _, _, share in UNARY]
        calls = self._mutator.random.choices(UNARY, shares, k=number)
        await in_flight([lambda call=call: self._unary(call[0], call[1]) for call in calls], IN_FLIGHT)

    async def generate(self, number: int, *, target: str = "Generate") -> None:
        await in_flight([lambda: self._stream(GENERATE, pb.GenerateRequest, target) for _ in range(number)], IN_FLIGHT)

    async def watch(self, number: int) -> None:
        await in_flight([lambda: self._stream(WATCH, HealthCheckRequest, "Watch") for _ in range(number)], IN_FLIGHT)

    async def reflect(self, number: int) -> None:
        """Send about so many messages over reflection."""
        await in_flight([lambda: self._reflection(20) for _ in range(number // 20)], SESSIONS)

    async def hold_sessions(self, number: int) -> None:
        """Send at least so many messages over Sessions."""
        end, give_up = self._tally.num_messages + number, time.monotonic() + PART_S

        async def one_after_another() -> None:
            while self._tally.num_messages < end and time.monotonic() < give_up:
                await self._session()

        await asyncio.gather(*(one_after_another() for _ in range(SESSIONS)))

    async def _unary(self, path: str, kind: type[Message]) -> None:
        data = self._next(kind)
        call = self._channel.unary_unary(path)(data, timeout=CALL_S)
        await self._end(path.rpartition("/")[2], call, [data])

    async def _stream(self, path: str, kind: type[Message], target: str) -> None:
        """One message, many answers; some calls are given up at any moment."""
        data = self._next(kind)
        gives_up = path == WATCH or self._mutator.random.random() < 0.1
        call = self._channel.unary_stream(path)(data, timeout=CALL_S)
        if gives_up:
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                await call.read()
            call.cancel()
        else:
            with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
                async for _ in call:
                    pass
        await self._end(target, call, [data])

    async def _reflection(self, number: int) -> None:
        call = self._channel.stream_stream(REFLECTION)(timeout=CALL_S)
        sent: list[bytes] = []
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
            for _ in range(number):
                sent.append(self._next(ServerReflectionRequest, is_stream=True))
                await call.write(sent[-1])
                if await call.read() is grpc.aio.EOF:
                    break
            await call.done_writing()
        await self._end("ServerReflectionInfo", call, sent[-2:])

    async def _session(self) -> None:
        draw = self._mutator.random
        call = self._channel.stream_stream(SESSION)()
        sent: list[bytes] = []
        reader = asyncio.create_task(self._read_session(call, sent))
        try:
            for _ in range(draw.randint(1, MAX_SESSION_MESSAGES)):
                sent.append(self._next(pb.SessionRequest, is_stream=True))
                await call.write(sent[-1])
                if draw.random() < 0.1:
                    await asyncio.sleep(draw.choice((0.0, 0.002, 0.01)))
            if draw.random() < 0.6:
                await call.done_writing()
                await asyncio.wait((reader,), timeout=SESSION_S)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it has ended; with what, `_end` says
        finally:
            call.cancel()
            await asyncio.wait((reader,))
        await self._end("Session", call, sent[-4:])

    async def _read_session(self, call: Any, sent: Sequence[bytes]) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            while (data := await call.read()) is not grpc.aio.EOF:
                for event in pb.SessionResponse.FromString(data).events:
                    if event.HasField("terminal"):
                        code = name_of(event.terminal.code)
                        self._tally.ended("Terminal", code, sent[-8:], event.terminal.message)

    async def _end(self, target: str, call: Any, messages: Sequence[bytes]) -> None:
        """Count the status of a call that is over. A replica may call an error of its own INTERNAL."""
        code, text = await status_of(call)
        if target == OF_HOSTILE and code == "INTERNAL" and text != status.INTERNAL_MESSAGE:
            code = "INTERNAL, as its replica said"
        self._tally.ended(target, code, messages, text)

    def _next(self, kind: type[Message], *, is_stream: bool = False) -> bytes:
        data = self._mutator.mutated(kind, self._samples[kind])
        if is_stream and self._mutator.random.random() > MANGLED:
            while parsed(kind, data) is None:
                data = self._mutator.mutated(kind, self._samples[kind])
        self._tally.sent()
        return data


async def in_flight(jobs: Sequence[Callable[[], Awaitable[None]]], number: int) -> None:
    """Do all of them, so many at once. Raises what one of them raises."""
    waiting = iter(jobs)

    async def work() -> None:
        for job in waiting:
            await job()

    async with asyncio.TaskGroup() as group:
        for _ in range(min(number, len(jobs))):
            group.create_task(work())
