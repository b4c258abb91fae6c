"""One router's stream at the data port, after its handshake: read by one task and written by another.

Those two are all that touch the gRPC call. What is read goes to the books (`work_ledger.py`), what is written comes out
of the router's outbox. Knows no engine and no other stream.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb

from workers.work_ledger import WorkLedger


class ProtocolError(Exception):
    """A router that proved itself says what none of ours would."""


class RouterStream:
    """`owner` names this attachment, unlike any other; `report_s` is how long news without tokens wait for company;
    `in_columns`: see `Outbox`."""

    def __init__(
        self, ledger: WorkLedger, owner: str, context: Any, report_s: float, *, in_columns: bool = False
    ) -> None:
        self.router = ledger.attach(owner, self._on_news, in_columns=in_columns)
        self.wake = asyncio.Event()
        self._ledger = ledger
        self._context = context
        self._report_s = report_s
        self._reporting: asyncio.TimerHandle | None = None
        self._is_closing = False

    async def serve(self, first: pb.AttachRequest) -> None:
        """Read and write until either side ends the stream. Raises what the reader raised."""
        reader = asyncio.create_task(self._read(first), name="data-plane-reader")
        writer = asyncio.create_task(self._write(), name="data-plane-writer")
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
        if not reader.cancelled() and (error := reader.exception()) is not None:
            raise error

    def close(self) -> None:
        """Let the writer end after what it is sending, and with it the stream."""
        self._is_closing = True
        self.wake.set()
        if self._reporting is not None:
            self._reporting.cancel()

    async def _read(self, first: pb.AttachRequest) -> None:
        message: Any = first
        while message is not grpc.aio.EOF:
            if message is None:
                raise ProtocolError("a message must be an AttachRequest")
            if message.HasField("hello") and message is not first:
                raise ProtocolError("only the first message of a stream may be a Hello")
            if message.HasField("dispatch"):
                self._ledger.submit(self.router, message.dispatch, time.monotonic())
            if message.HasField("abort"):
                self._ledger.abort(self.router, message.abort)
            if message.HasField("resync"):
                self._ledger.collect(anew=True)
            if message.HasField("credit"):
                self.router.outbox.grant(message.credit.step_batches)
                self.wake.set()
            message = await self._context.read()

    async def _write(self) -> None:
        outbox = self.router.outbox
        while not self._is_closing:
            await self.wake.wait()
            self.wake.clear()
            while outbox.can_take:
                await self._context.write(outbox.take())
                # write() may complete without suspending, and then nobody else would ever run.
                await asyncio.sleep(0)

    def _on_news(self, is_urgent: bool) -> None:
        if is_urgent:
            self.wake.set()
        elif self._reporting is None and not self._is_closing:
            # Load and events without tokens go a moment later: they may find company by then.
            self._reporting = asyncio.get_running_loop().call_later(self._report_s, self._report)

    def _report(self) -> None:
        self._reporting = None
        self.wake.set()
