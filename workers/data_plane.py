"""The replica's end of the data plane: a gRPC server by which routers that know the cluster's secret use an engine.

    engine thread --notify--> _collect (event loop) --> one Outbox per router --> one writer task per stream

Once per engine step all of a router's tokens go out in one message with the load and the KV events; what a slow router
does not take, its outbox merges. A router that disconnects loses its works: they are aborted. The server owns who is
attached and which works run for whom; it does not know requests, text or Ray.

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
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import grpc
import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceServicer, add_DataPlaneServiceServicer_to_server
from octavo.names import Reason

from workers.errors import StartupError
from workers.handshake import MIN_PROTOCOL, NONCE_BYTES, PROTOCOL, is_proven
from workers.outbox import Outbox
from workers.types import Engine, Finish, FinishReason, GenerateWork, KvEvent, KvEventKind, TokenDelta, Work, WorkId
from workers.wire import from_work, to_hello_ack
from workers.work_spans import WorkSpans

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
STOP_GRACE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPlaneTimes:
    hello_s: float = 5.0
    """How long a peer has to prove itself."""
    report_s: float = 0.05
    """How long load and KV events wait for tokens that they could travel with."""
    heartbeat_s: float = 1.0
    """How often a router hears of a replica on which nothing happens."""


class DataPlaneServer(DataPlaneServiceServicer):
    """All methods but `notify` belong to the event loop that `start` was called on.

    `key` is the cluster's data-plane key; `epoch` must grow with each start of the engine.
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
    ) -> None:
        self._replica_id = replica_id
        self._key = key
        self._host = host
        self._port = port
        self.epoch = time.time_ns() if epoch is None else epoch
        self._times = times or DataPlaneTimes()
        self._routers: dict[str, _Router] = {}
        self._works: dict[WorkId, _LiveWork] = {}
        self._resident: dict[bytes, None] = {}
        self._num_attached = 0
        self._is_notified = False
        self._is_draining = False
        self._is_stopping = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._heart: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None
        self._engine: Engine

    @property
    def address(self) -> str:
        """Where routers find this server, once started."""
        return f"{self._host}:{self._port}"

    @property
    def num_works(self) -> int:
        """Works that the engine has and that have not ended."""
        return len(self._works)

    @property
    def num_routers(self) -> int:
        return len(self._routers)

    async def start(self, engine: Engine) -> None:
        """Listen. `engine` calls `notify` when it has news. Raises StartupError when the port cannot be had."""
        assert self._server is None
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        server = grpc.aio.server(
            options=[
                # With it a port that is in use would go unnoticed, and routers would reach either server.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                # Routers ping to notice a silent replica, also while nothing is on the way.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 500),
            ]
        )
        add_DataPlaneServiceServicer_to_server(self, server)
        try:
            self._port = server.add_insecure_port(f"{self._host}:{self._port}")
        except RuntimeError:
            self._port = self._port or 0
            raise StartupError(f"the data port {self.address} cannot be bound: in use, or no address of ours") from None
        await server.start()
        self._server = server
        self._heart = self._loop.create_task(self._beat(), name="data-plane-heart")
        self._collect()

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
        self._is_draining = True
        for router in self._routers.values():
            router.outbox.announce_draining(grace_s)
            router.wake.set()
        assert self._loop is not None
        end = self._loop.time() + grace_s
        while self._works or any(router.outbox.has_deltas for router in self._routers.values()):
            if self._loop.time() >= end:
                return False
            await asyncio.sleep(0.01)
        return True

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Close all streams and the port; works that still run are aborted. Idempotent."""
        if self._server is None or self._is_stopping:
            return
        self._is_draining = self._is_stopping = True
        assert self._heart is not None
        self._heart.cancel()
        for router in self._routers.values():
            router.wake.set()
        await self._server.stop(grace_s)
        await asyncio.gather(self._heart, return_exceptions=True)

    # A router attaches.

    # gRPC names the method; its stub knows handlers that yield only.
    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        router, first = await self._shake_hands(context)
        try:
            await self._serve(router, first, context)
        finally:
            self._detach(router)

    async def _shake_hands(self, context: Any) -> tuple[_Router, pb.AttachRequest]:
        """Return the router at the other end, which has proven itself and fits, and its first message.

        A stranger learns this replica's id and nothing else.
        """
        if self._is_draining:
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
        if first is grpc.aio.EOF or not self._is_proven(first, nonce):
            text = "the first message must be a Hello that answers the challenge"
            await _refuse(context, grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_PROOF, text)
        mismatch = self._mismatch(first.hello)
        if mismatch:
            await _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, Reason.INCOMPATIBLE_PEER, mismatch)
        router = self._attach(first.hello)
        ack = to_hello_ack(
            self._engine.info,
            protocol=first.hello.protocol,
            replica_id=self._replica_id,
            epoch=self.epoch,
            pid=os.getpid(),
            load=self._engine.load(),
            resident=self._resident,
        )
        try:
            await context.write(pb.AttachResponse(hello_ack=ack))
        except BaseException:
            self._detach(router)
            raise
        return router, first

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

    def _attach(self, hello: pb.Hello) -> _Router:
        self._num_attached += 1
        # An owner of its own for each attachment: late tokens of a broken stream never reach the one that follows it.
        owner = f"{hello.router_id}/{hello.router_epoch}/{self._num_attached}"
        outbox = Outbox(max_kv_events=2 * self._engine.info.num_blocks, resident=lambda: self._resident)
        router = self._routers[owner] = _Router(owner, outbox)
        if self._is_draining:
            outbox.announce_draining(0.0)
        return router

    def _detach(self, router: _Router) -> None:
        """Forget a router and abort its works."""
        self._routers.pop(router.owner, None)
        for work_id, work in self._works.items():
            if work.router is router and not work.is_aborted:
                work.is_aborted = True
                self._engine.abort(work_id)

    async def _serve(self, router: _Router, first: pb.AttachRequest, context: Any) -> None:
        """Read and write until either side ends the stream."""
        reader = asyncio.create_task(self._read(router, first, context), name="data-plane-reader")
        writer = asyncio.create_task(self._write(router, context), name="data-plane-writer")
        try:
            await asyncio.wait((reader, writer), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reader.cancel()
            writer.cancel()
            await asyncio.gather(reader, writer, return_exceptions=True)
        for task in (reader, writer):
            if not task.cancelled() and isinstance(error := task.exception(), _ProtocolError):
                await _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, Reason.INCOMPATIBLE_PEER, str(error))

    async def _read(self, router: _Router, first: pb.AttachRequest, context: Any) -> None:
        message: Any = first
        while message is not grpc.aio.EOF:
            if message.HasField("hello") and message is not first:
                raise _ProtocolError("only the first message of a stream may be a Hello")
            if message.HasField("dispatch"):
                self._submit(router, message.dispatch)
            if message.HasField("abort"):
                self._abort(router, message.abort)
            if message.HasField("credit"):
                router.outbox.grant(message.credit.step_batches)
                router.wake.set()
            message = await context.read()

    async def _write(self, router: _Router, context: Any) -> None:
        while not self._is_stopping:
            await router.wake.wait()
            router.wake.clear()
            while router.outbox.can_take:
                await context.write(router.outbox.take())
                # write() may complete without suspending, and then nobody else would ever run.
                await asyncio.sleep(0)

    # Work goes in.

    def _submit(self, router: _Router, dispatch: pb.Dispatch) -> None:
        now = time.monotonic()
        batch = _Batch(dispatch.batch_id, self._engine.load().num_steps)
        router.batches.append(batch)
        for message in dispatch.work:
            try:
                work = from_work(message, router.owner, now)
            except ValueError as error:
                self._turn_down(router, WorkId(router.owner, message.work_id), 1, Reason.ENGINE_CAPABILITY, str(error))
                continue
            if self._is_draining:
                self._turn_down(router, work.work_id, _num_choices(work), Reason.DRAINING, "this replica is draining")
                continue
            if work.work_id in self._works:
                raise _ProtocolError(f"work {work.work_id.number} is running already")
            spans = WorkSpans.begin(work, self._replica_id)
            self._works[work.work_id] = _LiveWork(router, batch, work, spans)
            batch.num_unseen += 1
            self._engine.submit(work)

    def _turn_down(self, router: _Router, work_id: WorkId, num_choices: int, reason: str, message: str) -> None:
        """End a work that the engine never saw."""
        finish = Finish(reason=FinishReason.ERROR, error_reason=reason, error_message=message)
        for index in range(num_choices):
            router.outbox.add(TokenDelta(work_id=work_id, index=index, finish=finish))
        router.wake.set()

    def _abort(self, router: _Router, abort: pb.Abort) -> None:
        for number in abort.work_ids:
            work = self._works.get(WorkId(router.owner, number))
            if work is not None and not work.is_aborted:
                work.is_aborted = True
                self._engine.abort(work.work.work_id)

    # Tokens come out.

    def _collect(self) -> None:
        """Take what the engine produced and hand it to the outboxes."""
        # Cleared before draining: what comes in between is notified once more, never lost.
        self._is_notified = False
        deltas, events = self._engine.drain_outputs(), self._engine.kv_events()
        # After the outputs: a load that is too new only counts works as taken that are about to be seen.
        load = self._engine.load()
        self._keep_resident(events)
        for delta in deltas:
            self._deliver(delta)
        for router in self._routers.values():
            router.outbox.add_kv_events(events)
            router.outbox.report(load, router.last_counted_batch(load.num_steps))
            if router.outbox.has_deltas:
                router.wake.set()
            else:
                self._wake_later(router)

    def _deliver(self, delta: TokenDelta) -> None:
        work = self._works.get(delta.work_id)
        assert work is not None, "an engine ends each choice once"
        if not work.is_seen:
            work.is_seen = True
            work.batch.num_unseen -= 1
        if work.spans is not None:
            work.spans.observe(delta)
        finish = delta.finish
        if finish is not None:
            work.num_choices -= 1
            if work.num_choices == 0:
                del self._works[delta.work_id]
                if work.spans is not None:
                    work.spans.end(work.num_prompt_tokens)
            if finish.reason is FinishReason.CANCELLED and not work.is_aborted:
                # Nobody asked for it: the engine is being closed. To the request this is a lost replica.
                message = f"replica {self._replica_id} stopped"
                delta = replace(delta, finish=_lost(finish, message))
        if not work.is_aborted:
            work.router.outbox.add(delta)

    def _keep_resident(self, events: list[KvEvent]) -> None:
        for event in events:
            if event.kind is KvEventKind.STORED:
                self._resident[event.block_hash] = None
            elif event.kind is KvEventKind.REMOVED:
                self._resident.pop(event.block_hash, None)
            else:
                self._resident.clear()

    def _wake_later(self, router: _Router) -> None:
        """Send load and events without tokens, a moment later: they may find company by then."""
        assert self._loop is not None
        if not router.is_report_due:
            router.is_report_due = True
            self._loop.call_later(self._times.report_s, router.report_is_due)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._times.heartbeat_s)
            self._collect()


class _ProtocolError(Exception):
    """A router that proved itself says what none of ours would."""


class _Batch:
    """A Dispatch until the engine's load counts its works."""

    __slots__ = ("batch_id", "num_steps", "num_unseen")

    def __init__(self, batch_id: int, num_steps: int) -> None:
        self.batch_id = batch_id
        self.num_steps = num_steps
        """The engine's, when the batch was submitted."""
        self.num_unseen = 0
        """Works of which the engine has said nothing yet."""

    def is_counted(self, num_steps: int) -> bool:
        """Say whether a load after `num_steps` has these works in it. The engine may have been in a step when they
        came, and that one's load still lacks them; the next step begins with taking them in."""
        return self.num_unseen == 0 or num_steps >= self.num_steps + 2


class _Router:
    """One attached router."""

    __slots__ = ("_last_counted", "batches", "is_report_due", "outbox", "owner", "wake")

    def __init__(self, owner: str, outbox: Outbox) -> None:
        self.owner = owner
        self.outbox = outbox
        self.wake = asyncio.Event()
        self.batches: deque[_Batch] = deque()
        """In the order of arrival, those that the load does not count yet."""
        self.is_report_due = False
        self._last_counted = 0

    def last_counted_batch(self, num_steps: int) -> int:
        while self.batches and self.batches[0].is_counted(num_steps):
            self._last_counted = self.batches.popleft().batch_id
        return self._last_counted

    def report_is_due(self) -> None:
        self.is_report_due = False
        self.wake.set()


class _LiveWork:
    """A work that the engine has."""

    __slots__ = ("batch", "is_aborted", "is_seen", "num_choices", "num_prompt_tokens", "router", "spans", "work")

    def __init__(self, router: _Router, batch: _Batch, work: Work, spans: WorkSpans | None) -> None:
        self.router = router
        self.batch = batch
        self.work = work
        self.spans = spans
        self.num_choices = _num_choices(work)
        self.num_prompt_tokens = len(work.prompt) if isinstance(work, GenerateWork) else 0
        self.is_seen = False
        self.is_aborted = False


def _num_choices(work: Work) -> int:
    return work.n if isinstance(work, GenerateWork) else 1


def _lost(finish: Finish, message: str) -> Finish:
    return replace(finish, reason=FinishReason.ERROR, error_reason=Reason.REPLICA_LOST, error_message=message)


async def _refuse(context: Any, code: grpc.StatusCode, reason: str, message: str) -> NoReturn:
    """End the stream. The reason leads the message: the data plane has no error details."""
    await context.abort(code, f"{reason}: {message}")
    raise AssertionError("abort() raises")
