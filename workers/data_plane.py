"""The replica's end of the data plane: a gRPC server by which routers that know the cluster's secret use an engine.

    engine thread --notify--> _collect (event loop) --> one Outbox per router --> one writer task per stream

A router's tokens of a step, or of a few, go out in one message with the load and the KV events; what a slow router
does not take, its outbox merges. A router that disconnects loses its works: they are aborted. The server owns port and
streams, `WorkLedger` the books; neither knows requests, text or Ray.

    server = DataPlaneServer(replica_id=..., key=...)
    thread = EngineThread(engine, server.notify)
    await server.start(thread)      serve
    await server.drain(30.0)        no new work; what runs may end
    await server.stop()             then close the engine
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceServicer
from octavo.names import Reason

from workers.errors import StartupError
from workers.handshake import MIN_PROTOCOL, NONCE_BYTES, PROTOCOL, TOKENS_PROTOCOL, is_proven
from workers.router_stream import ProtocolError, RouterStream
from workers.step_telemetry import StepTelemetry
from workers.types import Engine
from workers.wire import to_hello_ack
from workers.work_ledger import BadDispatchError, WorkLedger

SERVICE = pb.DESCRIPTOR.services_by_name["DataPlaneService"].full_name
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
STOP_GRACE_S = 1.0
MAX_REFUSAL = 500
"""Characters: what a peer said may be in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlaneTimes:
    hello_s: float = 5.0
    """How long a peer has to prove itself."""
    report_s: float = 0.05
    """How long load and KV events wait for tokens that they could travel with."""
    heartbeat_s: float = 1.0
    """How often a router hears of a replica on which nothing happens."""
    silence_s: float = 10.0
    """A router of which nothing is heard for this long, not even the answer to a ping, is gone."""


class DataPlaneServer(DataPlaneServiceServicer):
    """All methods but `notify` belong to the event loop that `start` was called on.

    `key` is the cluster's data-plane key; `epoch` must grow with each start of the engine.
    `credentials`: for TLS with routers of this cluster alone (`workers/peer_tls.py`); None: in clear.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        key: bytes,
        host: str = "127.0.0.1",
        port: int = 0,
        epoch: int | None = None,
        times: DataPlaneTimes | None = None,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._replica_id = replica_id
        self._key = key
        self._host = host
        self._port = port
        self.epoch = time.time_ns() if epoch is None else epoch
        self._times = times or DataPlaneTimes()
        self._streams: set[RouterStream] = set()
        self._num_attached = 0
        self._is_notified = False
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heart: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._engine: Engine
        self._ledger: WorkLedger

    @property
    def address(self) -> str:
        """Where routers find this server, once started."""
        return f"{self._host}:{self._port}"

    @property
    def is_encrypted(self) -> bool:
        return self._credentials is not None

    @property
    def num_works(self) -> int:
        """Works that the engine has and that have not ended."""
        return self._ledger.num_works

    @property
    def num_routers(self) -> int:
        return len(self._streams)

    async def start(self, engine: Engine, steps: StepTelemetry | None = None) -> None:
        """Listen. `engine` calls `notify` when it has news; `steps` hears of its steps. Raises StartupError when the
        port cannot be had."""
        assert self._server is None
        self._engine = engine
        self._ledger = WorkLedger(engine, self._replica_id, steps)
        self._loop = asyncio.get_running_loop()
        server = grpc.aio.server(
            options=[
                # With it a port that is in use would go unnoticed, and routers would reach either server.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # Routers ping to notice a silent replica, also while nothing is on the way.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.keepalive_time_ms", round(self._times.silence_s * 500)),
                ("grpc.keepalive_timeout_ms", round(self._times.silence_s * 500)),
                # A keepalive ping that waits for the answer to one of another kind has that one's limit, else a minute.
                ("grpc.http2.ping_timeout_ms", round(self._times.silence_s * 500)),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ]
        )
        server.add_generic_rpc_handlers((self._handler(),))
        try:
            if self._credentials is None:
                self._port = server.add_insecure_port(self.address)
            else:
                self._port = server.add_secure_port(self.address, self._credentials)
        except RuntimeError:
            raise StartupError(f"the data port {self.address} cannot be bound: in use, or no address of ours") from None
        await server.start()
        self._server = server
        self._heart = self._loop.create_task(self._beat(), name="data-plane-heart")
        self._collect()

    def _handler(self) -> grpc.GenericRpcHandler:
        """As the generated code makes it, but for messages that are none: `Attach` has an answer for these, too."""
        attach = grpc.stream_stream_rpc_method_handler(
            self.Attach, request_deserializer=_parse, response_serializer=pb.AttachResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE, {"Attach": attach})

    def notify(self) -> None:
        """Say that the engine has news. From any thread; never blocks or raises; before `start` and after `stop` it
        has no effect."""
        if self._loop is None or self._is_notified:
            return
        self._is_notified = True
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._collect)

    async def drain(self, grace_s: float) -> bool:
        """Refuse new work; wait until what runs has ended and was sent, `grace_s` at most. Return whether it has."""
        self._ledger.is_draining = True
        for stream in self._streams:
            stream.router.outbox.announce_draining(grace_s)
            stream.wake.set()
        assert self._loop is not None
        end = self._loop.time() + grace_s
        while self.num_works or any(stream.router.outbox.has_deltas for stream in self._streams):
            if self._loop.time() >= end:
                return False
            await asyncio.sleep(0.01)
        return True

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Close all streams and the port; works that still run are aborted. Idempotent."""
        if self._server is None or self._is_stopping:
            return
        self._is_stopping = self._ledger.is_draining = True
        assert self._heart is not None
        self._heart.cancel()
        for stream in self._streams:
            stream.close()
        await self._server.stop(grace_s)
        await asyncio.gather(self._heart, return_exceptions=True)

    # A router attaches.

    # gRPC names the method; its stub knows handlers that yield only.
    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        first = await self._shake_hands(context)
        stream = self._attach(first.hello, context)
        try:
            ack = to_hello_ack(
                self._engine.info,
                protocol=first.hello.protocol,
                replica_id=self._replica_id,
                epoch=self.epoch,
                pid=os.getpid(),
                load=self._engine.load(),
                resident=self._ledger.resident,
            )
            await context.write(pb.AttachResponse(hello_ack=ack))
            await stream.serve(first)
        except (ProtocolError, BadDispatchError) as error:
            await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, Reason.INCOMPATIBLE_PEER, str(error))
        finally:
            self._streams.discard(stream)
            self._ledger.detach(stream.router)
            stream.close()

    async def _shake_hands(self, context: Any) -> Any:
        """Return the first message of a router that has proven itself and fits.

        A stranger learns this replica's id and nothing else.
        """
        if self._ledger.is_draining:
            await _refuse(context, grpc.StatusCode.UNAVAILABLE, Reason.DRAINING, "this replica is draining")
        nonce = secrets.token_bytes(NONCE_BYTES)
        await context.write(
            pb.AttachResponse(
                challenge=pb.Challenge(
                    nonce=nonce, replica_id=self._replica_id, min_protocol=MIN_PROTOCOL, max_protocol=PROTOCOL
                )
            )
        )
        try:
            async with asyncio.timeout(self._times.hello_s):
                first = await context.read()
        except TimeoutError:
            first = grpc.aio.EOF
        if not isinstance(first, pb.AttachRequest) or not self._is_proven(first, nonce):
            text = "the first message must be a Hello that answers the challenge"
            await _refuse(context, grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_PROOF, text)
        mismatch = self._mismatch(first.hello)
        if mismatch:
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, Reason.INCOMPATIBLE_PEER, mismatch)
        return first

    def _is_proven(self, first: pb.AttachRequest, nonce: bytes) -> bool:
        hello = first.hello
        return is_proven(
            hello.proof,
            self._key,
            nonce=nonce,
            replica_id=self._replica_id,
            router_id=hello.router_id,
            router_epoch=hello.router_epoch,
        )

    def _mismatch(self, hello: pb.Hello) -> str:
        """Return why this router must not use this replica; empty if it may."""
        if not MIN_PROTOCOL <= hello.protocol <= PROTOCOL:
            return f"protocol must be in [{MIN_PROTOCOL}, {PROTOCOL}], is {hello.protocol}"
        info, expected = self._engine.info, hello.fingerprints
        for name, theirs, ours in (
            ("model", expected.model, info.model_fingerprint),
            ("tokenizer", expected.tokenizer, info.tokenizer_fingerprint),
            ("hash key", expected.hash_key, info.hash_key_fingerprint),
        ):
            if theirs and theirs != ours:
                return f"the router expects {name} {theirs!r}, this replica has {ours!r}"
        return ""

    def _attach(self, hello: pb.Hello, context: Any) -> RouterStream:
        self._num_attached += 1
        # An owner of its own for each attachment: late tokens of a broken stream never reach the one that follows it.
        owner = f"{hello.router_id}/{hello.router_epoch}/{self._num_attached}"
        in_columns = hello.protocol >= TOKENS_PROTOCOL
        stream = RouterStream(self._ledger, owner, context, self._times.report_s, in_columns=in_columns)
        self._streams.add(stream)
        if self._ledger.is_draining:
            stream.router.outbox.announce_draining(0.0)
        return stream

    def _collect(self) -> None:
        """Take what the engine produced and hand it to the outboxes."""
        # Cleared before draining: what comes in between is notified once more, never lost.
        self._is_notified = False
        self._ledger.collect()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._times.heartbeat_s)
            self._collect()


def _parse(data: bytes) -> pb.AttachRequest | None:
    """Return a message, None for what is none; gRPC would end the stream with the exception's text."""
    try:
        return pb.AttachRequest.FromString(data)
    except DecodeError:
        return None


async def _refuse(context: Any, code: grpc.StatusCode, reason: str, message: str) -> NoReturn:
    """End the stream. The reason leads the message: the data plane has no error details."""
    await context.abort(code, f"{reason}: {message}"[:MAX_REFUSAL])
    raise AssertionError("abort() raises")
