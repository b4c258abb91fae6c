"""How a planned request reaches a router: over octavo.client's Session, or one Generate call each.

Both give an `Answer`: an async iterable of pieces that raises a CallError if the request does not end well. Neither
looks at a clock nor counts anything.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import grpc
import grpc.aio
from octavo.client import Client, ClientOptions, RequestCancelledError
from octavo.client.errors import from_rpc
from octavo.client.request import make_request
from octavo.names import Metadata, Reason
from octavo.v1 import inference_service_pb2_grpc as pb_grpc
from octavo.v1 import types_pb2

from load_tests.generator.request import PlannedRequest
from load_tests.generator.scenario import Calling

MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_NO_RETRY_S = 1e-3
"""Shorter than the client's shortest pause before it tries again."""


class Piece(Protocol):
    """What an answer brings at once: octavo.client's Delta, or the wire's."""

    @property
    def token_ids(self) -> Sequence[int]: ...
    @property
    def text(self) -> str: ...


class Account(Protocol):
    """octavo.client's Usage, or the wire's."""

    @property
    def prompt_tokens(self) -> int: ...
    @property
    def cached_tokens(self) -> int: ...
    @property
    def generated_tokens(self) -> int: ...
    @property
    def queue_s(self) -> float: ...
    @property
    def prefill_s(self) -> float: ...
    @property
    def decode_s(self) -> float: ...
    @property
    def replica(self) -> str: ...


class Answer(Protocol):
    def __aiter__(self) -> AsyncIterator[Piece]:
        """Read on. Raises CallError."""
        ...

    def cancel(self) -> None:
        """Idempotent."""

    @property
    def usage(self) -> Account | None:
        """Set when the request has ended, where the router could tell."""
        ...


class Caller(Protocol):
    async def open(self) -> None: ...

    def call(self, request: PlannedRequest) -> Answer:
        """Begin a request. Raises CallError for what cannot be sent."""
        ...

    async def close(self) -> None:
        """Cancel what still runs."""


def make_caller(target: str, calling: Calling) -> Caller:
    return SessionCaller(target, calling) if calling.kind == "session" else GenerateCaller(target, calling)


class SessionCaller:
    """Spreads requests over `calling.streams` clients, each with a Session of its own."""

    def __init__(self, target: str, calling: Calling) -> None:
        options = ClientOptions(
            window=calling.window,
            retry_timeout_s=calling.retry_s or _NO_RETRY_S,
            max_message_bytes=MAX_MESSAGE_BYTES,
        )
        self._clients = [Client(target, options=options) for _ in range(calling.streams)]
        self._turn = itertools.cycle(self._clients)

    async def open(self) -> None:
        for client in self._clients:
            await client.__aenter__()

    def call(self, request: PlannedRequest) -> Answer:
        return next(self._turn).generate(
            request.prompt,
            model=request.model,
            timeout=request.timeout_s,
            request_id=request.request_id,
            **request.options,
        )

    async def close(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))


class GenerateCaller:
    """One server-streaming call a request, over `calling.streams` connections."""

    def __init__(self, target: str, calling: Calling) -> None:
        self._target = target
        self._calling = calling
        self._channels: list[grpc.aio.Channel] = []

    async def open(self) -> None:
        options = [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ]
        self._channels = [grpc.aio.insecure_channel(self._target, options) for _ in range(self._calling.streams)]
        stubs: list[pb_grpc.InferenceServiceAsyncStub] = [
            pb_grpc.InferenceServiceStub(channel) for channel in self._channels
        ]
        self._turn = itertools.cycle(stubs)

    def call(self, request: PlannedRequest) -> Answer:
        message = make_request(request.prompt, model=request.model, options=request.options)
        metadata = [(Metadata.REQUEST_ID, request.request_id)]
        if self._calling.tenant_header:
            metadata.append((self._calling.tenant_header, request.tenant))
        return _Call(next(self._turn).Generate(message, timeout=request.timeout_s, metadata=metadata))

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))


class _Call:
    """The answer to one Generate."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.usage: types_pb2.Usage | None = None

    def cancel(self) -> None:
        self._call.cancel()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        try:
            while (message := await self._call.read()) is not grpc.aio.EOF:
                if message.HasField("usage"):
                    self.usage = message.usage
                for delta in message.deltas:
                    yield delta
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # not the call: this task
                raise
            raise RequestCancelledError("the client cancelled the request", reason=Reason.CANCELLED) from None
