"""An OTLP collector that takes all spans and keeps none, and that can be dead or mute for a while.

serving    it answers every export
dead       nobody listens on its port, and its connections are closed
mute       it takes exports and never answers them
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, Self

import grpc
import grpc.aio

LOOPBACK = "127.0.0.1"


class Collector:
    """Serves while entered, at `endpoint`."""

    def __init__(self) -> None:
        self.num_exports = 0
        """That were answered."""
        self.num_unanswered = 0
        """Exports that came while it was mute."""
        self.is_mute = False
        self._sink = grpc.aio.server()
        self._sink.add_generic_rpc_handlers((_Sink(self),))
        self._sink_port = self._sink.add_insecure_port(f"{LOOPBACK}:0")
        self._front: asyncio.Server | None = None
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        return f"http://{LOOPBACK}:{self._port}"

    async def __aenter__(self) -> Self:
        await self._sink.start()
        await self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()
        await self._sink.stop(None)

    @asynccontextmanager
    async def dead(self) -> AsyncIterator[None]:
        await self._close()
        try:
            yield
        finally:
            await self._open()

    @contextmanager
    def mute(self) -> Iterator[None]:
        """Exports that come in the scope are never answered, also after it."""
        self.is_mute = True
        try:
            yield
        finally:
            self.is_mute = False

    async def _open(self) -> None:
        self._front = await asyncio.start_server(self._serve, LOOPBACK, self._port)
        self._port = self._front.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._front is not None
        self._front.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.CancelledError):
                await self._pass_on(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sink_reader, sink_writer = await asyncio.open_connection(LOOPBACK, self._sink_port)
        back = asyncio.create_task(_copy(sink_reader, writer))
        try:
            await _copy(reader, sink_writer)
        finally:
            back.cancel()
            await asyncio.gather(back, return_exceptions=True)
            sink_writer.transport.abort()


class _Sink(grpc.GenericRpcHandler):
    """Answers every call with an empty message, which says that all was taken, unless it is to be mute."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        async def export(_request: bytes, _context: object) -> bytes:
            if self._collector.is_mute:
                self._collector.num_unanswered += 1
                await asyncio.Event().wait()  # until the caller gives up
            self._collector.num_exports += 1
            return b""

        return grpc.unary_unary_rpc_method_handler(export)


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    while data := await source.read(65_536):
        sink.write(data)
        await sink.drain()
