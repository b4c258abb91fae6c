"""One Session stream to one router: a writer task that merges what is pending, a reader that fans out what comes.

Owns the gRPC call, its channel (of its own: a new Session after a GoAway must not land on the connection that is being
closed) and both tasks. Does not know retries or other Sessions; tells its `SessionOwner`, on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

import grpc
import grpc.aio

from octavo.client.errors import CallError, UnavailableError, from_rpc
from octavo.client.exchange import Exchange
from octavo.client.outbox import Outbox
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import inference_service_pb2_grpc as pb_grpc

_LOGGER = logging.getLogger(__name__)

_VERDICT_S = 0.5
_VERDICT_POLL_S = 0.001
"""How long to look for the status of a call after a write failed."""

_PROVEN_AFTER_S = 1.0
"""A connected Session that lived this long was sound, even if nothing came."""


class SessionOwner(Protocol):
    """What a Session reports; none of these raises."""

    def session_started(self, exchange: Exchange) -> None:
        """The exchange's Start has left for a router that is connected."""

    def session_terminated(self, exchange: Exchange, terminal: pb.Terminal) -> None:
        """The router ended the exchange; the Session has forgotten it."""

    def session_broke_contract(self, exchange: Exchange, error: CallError) -> None:
        """The router sent what cannot be; the Session still carries the exchange."""

    def session_going_away(self, session: Session, go_away: pb.GoAway) -> None:
        """Start no more here; the Session ends by itself after its last exchange."""

    def session_ended(self, session: Session, error: CallError | None) -> None:
        """The stream is over, with `exchanges` still on it. `error` is None if it was closed on purpose."""


class Session:
    """Starts its tasks when made; ends when the stream breaks, after `retire` with its last exchange, or by `close`."""

    def __init__(
        self, channel: grpc.aio.Channel, owner: SessionOwner, *, metadata: tuple[tuple[str, str], ...] = ()
    ) -> None:
        self.exchanges: dict[str, Exchange] = {}
        self.cancelled: dict[str, Exchange] = {}
        """Cancelled here; the router's Terminal for them is still to come, and perhaps it never heard of it."""
        self._owner = owner
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self._outbox = Outbox()
        self._wake = asyncio.Event()
        self._held: dict[str, Exchange] = {}
        """Exchanges that use the id of a cancelled one again; they start after its Terminal."""
        self._connected_at: float | None = None
        self._has_events = False
        self._is_retiring = False
        self._is_closing = False
        stub: pb_grpc.InferenceServiceAsyncStub = pb_grpc.InferenceServiceStub(channel)
        self._call = stub.Session(metadata=metadata)
        self._is_write_unsure = False
        """A write is under way, or has met the end of the call."""
        self._task = self._loop.create_task(self._run(), name="octavo-session")

    @property
    def is_connected(self) -> bool:
        """Whether a router was ever reached."""
        return self._connected_at is not None

    @property
    def is_proven(self) -> bool:
        """Whether this Session worked, so that its end is a new event and not one more failed try."""
        if self._has_events:
            return True
        return self._connected_at is not None and self._loop.time() - self._connected_at >= _PROVEN_AFTER_S

    def start(self, exchange: Exchange) -> None:
        """Carry `exchange` from now on."""
        self.exchanges[exchange.request_id] = exchange
        if exchange.request_id in self.cancelled:
            self._held[exchange.request_id] = exchange
        else:
            self._outbox.start(exchange)
            self._wake.set()

    def cancel(self, exchange: Exchange) -> None:
        """Carry `exchange` no longer, and tell the router."""
        if self.exchanges.pop(exchange.request_id, None) is None:
            return
        if self._held.pop(exchange.request_id, None) is not None:
            return
        if self._outbox.cancel(exchange.request_id):
            self.cancelled[exchange.request_id] = exchange
        self._wake.set()

    def abandon(self, exchange: Exchange) -> None:
        """End, at this router, an exchange that an earlier Session started: attach to it and cancel it."""
        self._outbox.start(exchange)
        self._outbox.cancel(exchange.request_id, after_start=True)
        self.cancelled[exchange.request_id] = exchange
        self._wake.set()

    def grant(self, exchange: Exchange, tokens: int) -> None:
        if exchange.request_id in self.exchanges and exchange.request_id not in self._held:
            self._outbox.grant(exchange.request_id, tokens)
            self._wake.set()

    def retire(self) -> list[Exchange]:
        """End after the last exchange; return those whose Start has not left, which are no longer carried."""
        self._is_retiring = True
        self._wake.set()
        withdrawn = [*self._outbox.withdraw(), *self._held.values()]
        self._held.clear()
        for exchange in withdrawn:
            self.exchanges.pop(exchange.request_id, None)
        return withdrawn

    async def close(self, timeout_s: float) -> None:
        """Send what is pending, close the stream, and be over within about `timeout_s`."""
        self._is_closing = True
        self.exchanges.clear()
        self.retire()
        await asyncio.wait([self._task], timeout=timeout_s if self.is_connected else 0)
        self._call.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        writer = self._loop.create_task(self._write(), name="octavo-session-writer")
        error: CallError | None = UnavailableError("the Session broke off", reason=Reason.SESSION_LOST)
        try:
            error = await self._read()
        finally:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
            await self._channel.close()
            self._owner.session_ended(self, error)

    async def _write(self) -> None:
        try:
            await self._call.wait_for_connection()
            self._connected_at = self._loop.time()
            while True:
                await self._wake.wait()
                self._wake.clear()
                while self._outbox:
                    message, started = self._outbox.take(self._loop.time())
                    self._is_write_unsure = True
                    await self._call.write(message)
                    self._is_write_unsure = False
                    for exchange in started:
                        self._owner.session_started(exchange)
                if self._is_retiring and not self.exchanges:
                    await self._call.done_writing()
                    return
        except grpc.aio.AioRpcError:
            self._is_write_unsure = True  # the call is over; the reader learns why
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            self._is_write_unsure = False  # likewise, and it had its status already
        except Exception:
            _LOGGER.exception("a Session's writer failed; the Session is given up")
            self._call.cancel()

    async def _read(self) -> CallError | None:
        try:
            while True:
                response = await self._call.read()
                if not isinstance(response, pb.SessionResponse):  # grpc.aio.EOF
                    break
                self._fan_out(response)
        except grpc.aio.AioRpcError as error:
            return from_rpc(await self._verdict(error))
        except asyncio.CancelledError:
            if self._task.cancelling():  # not only the call: this task
                raise
            if self._is_closing:
                return None
        if self._is_closing or (self._is_retiring and not self.exchanges):
            return None
        return UnavailableError("the router closed the Session", reason=Reason.SESSION_LOST)

    async def _verdict(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """Return how the router ended the call, if it did.

        When a write meets the end of the call, grpc.aio calls that INTERNAL at once, and tells whoever reads before
        whoever writes; the router's own status, which tells whether another try makes sense, takes its place when it
        has been read, a moment later.
        """
        give_up = self._loop.time() + _VERDICT_S
        while self._is_write_unsure and error.code() is grpc.StatusCode.INTERNAL and self._loop.time() < give_up:
            await asyncio.sleep(_VERDICT_POLL_S)
            error = grpc.aio.AioRpcError(
                await self._call.code(),
                await self._call.initial_metadata(),
                await self._call.trailing_metadata(),
                details=await self._call.details(),
            )
        return error

    def _fan_out(self, response: pb.SessionResponse) -> None:
        for event in response.events:
            self._has_events = True
            is_terminal = event.HasField("terminal")
            if event.request_id in self.cancelled:
                if is_terminal:
                    self._bury(event.request_id)
                continue
            exchange = self.exchanges.get(event.request_id)
            if exchange is None:
                continue
            if is_terminal:
                del self.exchanges[event.request_id]
                self._owner.session_terminated(exchange, event.terminal)
                continue
            try:
                exchange.deliver(event.delta)
            except CallError as error:
                self._owner.session_broke_contract(exchange, error)
        if self._is_retiring and not self.exchanges:
            self._wake.set()
        if response.HasField("go_away"):
            self._owner.session_going_away(self, response.go_away)

    def _bury(self, request_id: str) -> None:
        """The router has ended a cancelled request: its id is free again."""
        self.cancelled.pop(request_id, None)
        held = self._held.pop(request_id, None)
        if held is not None:
            self._outbox.start(held)
            self._wake.set()
