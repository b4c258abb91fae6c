"""Calls to a running cluster with the plain generated stubs, and what came of them as values."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from octavo.v1 import types_pb2
from octavo.v1.inference_service_pb2 import (
    GenerateRequest,
    GenerateResponse,
    SessionRequest,
    Start,
    Terminal,
)
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub
from octavo.v1.status_service_pb2 import GetStatusRequest, GetStatusResponse
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

TIMEOUT_S = 60.0


@dataclass
class Answer:
    """What one call delivered. `code` is None as long as it has not ended."""

    tokens: list[int] = field(default_factory=list)
    code: grpc.StatusCode | None = None
    details: str = ""
    usage: types_pb2.Usage | None = None
    num_terminals: int = 0

    @property
    def replica(self) -> str:
        return self.usage.replica if self.usage is not None else ""


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield channel


def request(prompt: Sequence[int], max_tokens: int) -> GenerateRequest:
    """A request whose answer has exactly `max_tokens` tokens."""
    ids = types_pb2.TokenIds(ids=prompt)
    return GenerateRequest(prompt=types_pb2.Prompt(token_ids=ids), max_tokens=max_tokens, ignore_eos=True)


async def generate(
    channel: grpc.aio.Channel,
    asked: GenerateRequest,
    *,
    timeout_s: float = TIMEOUT_S,
    metadata: Mapping[str, str] | None = None,
    on_tokens: Callable[[], None] | None = None,
    cancel_after_s: float | None = None,
) -> Answer:
    """Call Generate and wait for its end. `on_tokens` is called at the first token."""
    answer = Answer()
    call = InferenceServiceStub(channel).Generate(asked, timeout=timeout_s, metadata=tuple((metadata or {}).items()))
    if cancel_after_s is not None:
        asyncio.get_running_loop().call_later(cancel_after_s, call.cancel)
    try:
        async for response in call:
            if not answer.tokens and on_tokens is not None:
                on_tokens()
            _take(answer, response)
    except grpc.aio.AioRpcError:
        pass
    except asyncio.CancelledError:
        # grpc.aio raises it for a call that was cancelled, too.
        if not call.cancelled():
            raise
    answer.code = await call.code()
    answer.details = await call.details() or ""
    answer.num_terminals = 1
    return answer


def _take(answer: Answer, response: GenerateResponse) -> None:
    for delta in response.deltas:
        assert delta.token_offset == len(answer.tokens)
        answer.tokens += delta.token_ids
    if response.HasField("usage"):
        answer.usage = response.usage


class Session:
    """One Session stream. Within ``async with``; leaving it closes the stream."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._call: Any = InferenceServiceStub(channel).Session()
        self.answers: dict[str, Answer] = {}
        self._changed = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Session:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reader is not None
        self._call.cancel()
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def start(self, starts: Mapping[str, GenerateRequest], *, timeout_s: float = TIMEOUT_S, **extra: Any) -> None:
        message = SessionRequest()
        for request_id, asked in starts.items():
            self.answers[request_id] = Answer()
            start = Start(request_id=request_id, request=asked, **extra)
            start.timeout.FromNanoseconds(int(timeout_s * 1e9))
            message.starts.append(start)
        await self._call.write(message)

    async def cancel(self, request_id: str) -> None:
        message = SessionRequest()
        message.cancels.add(request_id=request_id)
        await self._call.write(message)

    async def end(self) -> None:
        """Wait until every request has its terminal."""
        async with asyncio.timeout(TIMEOUT_S):
            while any(answer.code is None for answer in self.answers.values()):
                self._changed.clear()
                await self._changed.wait()

    async def _read(self) -> None:
        async for response in self._call:
            for event in response.events:
                answer = self.answers[event.request_id]
                assert answer.code is None, "nothing follows a terminal"
                if event.HasField("delta"):
                    assert event.delta.token_offset == len(answer.tokens)
                    answer.tokens += event.delta.token_ids
                else:
                    _end(answer, event.terminal)
            self._changed.set()


def _end(answer: Answer, terminal: Terminal) -> None:
    answer.code = next(code for code in grpc.StatusCode if code.value[0] == terminal.code)
    answer.details = terminal.message
    answer.usage = terminal.usage
    answer.num_terminals += 1


async def status(channel: grpc.aio.Channel) -> GetStatusResponse:
    response: GetStatusResponse = await StatusServiceStub(channel).GetStatus(GetStatusRequest(), timeout=TIMEOUT_S)
    return response


async def await_status(
    channel: grpc.aio.Channel, holds: Callable[[GetStatusResponse], bool], timeout_s: float = TIMEOUT_S
) -> GetStatusResponse:
    """Return the first status for which `holds` says yes."""
    end = asyncio.get_running_loop().time() + timeout_s
    while not holds(found := await status(channel)):
        assert asyncio.get_running_loop().time() < end, f"not within {timeout_s} s:\n{found}"
        await asyncio.sleep(0.1)
    return found


def has_ready(count: int) -> Callable[[GetStatusResponse], bool]:
    return lambda found: [replica.state for replica in found.replicas] == ["ready"] * count


def is_idle(found: GetStatusResponse) -> bool:
    """Whether nothing of any request is left: in the router, in the engines, in their block pools."""
    router = found.router
    return (
        router.num_queued_requests == router.num_queued_tokens == router.num_running_requests == 0
        and router.num_accepted_total == router.num_ended_total
        and all(
            replica.num_running == replica.num_waiting == 0 and replica.num_free_blocks == replica.num_blocks
            for replica in found.replicas
        )
    )


async def octavo_trace(address: str, *arguments: str) -> tuple[int, str, str]:
    """Run `octavo trace`; return its exit code and what it wrote to stdout and stderr."""
    command = (sys.executable, "-m", "cluster.cli", "trace", *arguments, "--address", address)
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=150, check=False)
    return done.returncode, done.stdout, done.stderr
