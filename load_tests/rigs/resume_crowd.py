"""Clients that ask a router many things, some at once, half of them through octavo.client's Session and half by plain
Generate calls, whose every message is seen as the router sent it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio
from octavo.client import CallError, Client, Delta
from octavo.client.request import make_request
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from load_tests.rigs.resume_asks import Ask
from load_tests.rigs.resume_stream import Stream

TIMEOUT_S = 180.0
"""Of one request, for its client alone: routers refuse what has a deadline by what they expect, and whether they expect
the right thing is not asked here. No request comes near it unless something is wrong."""
POLL_S = 0.01


class Crowd:
    """Puts `asks` to a router in their order, `at_once` at a time; `streams` are their answers."""

    def __init__(self, client: Client, channel: grpc.aio.Channel, asks: Sequence[Ask], *, at_once: int) -> None:
        self.streams = [Stream(ask) for ask in asks]
        self.at_once = at_once
        self._client = client
        self._stub: Any = InferenceServiceStub(channel)
        self._slots = asyncio.Semaphore(at_once)

    @property
    def num_ended(self) -> int:
        return sum(stream.is_ended for stream in self.streams)

    def speaking(self) -> list[Stream]:
        """Return those under way of which some tokens have come."""
        return [stream for stream in self.streams if stream.is_open and stream.token_ids]

    async def run(self) -> None:
        """Return when all have ended, well or not."""
        await asyncio.gather(*map(self._ask, self.streams))

    async def until(self, holds: Callable[[], bool], timeout_s: float) -> None:
        """Wait for what comes with answers. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not holds():  # noqa: ASYNC110  it is asked for seldom, and of many streams
                await asyncio.sleep(POLL_S)

    async def _ask(self, stream: Stream) -> None:
        async with self._slots:
            stream.is_begun = True
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    await (self._in_session if stream.ask.call == "session" else self._in_call)(stream)
            except TimeoutError:
                stream.error = f"no end within {TIMEOUT_S:g} s"
            else:
                stream.is_ended = True

    async def _in_session(self, stream: Stream) -> None:
        generation = self._client.generate(stream.ask.prompt, **stream.ask.options)
        try:
            async for delta in generation:
                stream.took(delta, time.monotonic())
        except CallError as error:
            stream.error = f"{type(error).__name__} {error.reason}"
        if generation.decision is not None:
            stream.attempts = generation.decision.attempt

    async def _in_call(self, stream: Stream) -> None:
        request = make_request(stream.ask.prompt, model="", options=stream.ask.options)
        try:
            async for response in self._stub.Generate(request):
                now = time.monotonic()
                for delta in response.deltas:
                    stream.took(Delta.from_wire(delta), now)
                if response.HasField("decision"):
                    stream.attempts = response.decision.attempt
        except grpc.aio.AioRpcError as error:
            stream.error = f"{error.code().name} {error.details()}"
