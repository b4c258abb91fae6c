"""A router in miniature, over real gRPC on loopback, that keeps the contract of Session and breaks on command.

Every request is answered with numbered tokens (`FIRST_TOKEN`, `FIRST_TOKEN + 1`, ...; text "0 1 2 ..."), as many as its
`max_tokens` (default 8). Nothing depends on time: tokens come at once, except that a test may `hold` the answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
from google.protobuf import any_pb2, wrappers_pb2
from google.rpc import error_details_pb2, status_pb2
from octavo.v1 import (
    inference_service_pb2,
    inference_service_pb2_grpc,
    model_service_pb2,
    model_service_pb2_grpc,
    status_service_pb2,
    status_service_pb2_grpc,
    types_pb2,
)

pb = inference_service_pb2
FIRST_TOKEN = 100
DEFAULT_TOKENS = 8


def expected_text(num_tokens: int) -> str:
    return "".join(f"{i} " for i in range(num_tokens))


def expected_ids(num_tokens: int) -> tuple[int, ...]:
    return tuple(range(FIRST_TOKEN, FIRST_TOKEN + num_tokens))


@dataclass(eq=False)
class Connection:
    """One Session as the router sees it."""

    peer: str
    events: list[pb.Event] = field(default_factory=list)
    go_away: pb.GoAway | None = None
    fault: grpc.StatusCode | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    is_half_closed: bool = False

    def send(self, request_id: str, **event: object) -> None:
        self.events.append(pb.Event(request_id=request_id, **event))  # type: ignore[arg-type]
        self.wake.set()


@dataclass(eq=False)
class Journal:
    """One request: how much of its answer left, and what may leave."""

    start: pb.Start
    total: int
    connection: Connection | None = None
    num_sent: int = 0
    window: int = 1 << 30
    num_unread_max: int = 0


class ScriptedRouter(inference_service_pb2_grpc.InferenceServiceServicer):
    def __init__(self) -> None:
        self.starts: list[pb.Start] = []
        self.cancels: list[str] = []
        self.grants: list[tuple[str, int]] = []
        self.messages: list[pb.SessionRequest] = []
        self.sessions: list[Connection] = []
        self.num_sessions = 0
        self.journals: dict[str, Journal] = {}
        self.refusals: list[pb.Terminal] = []
        """Answers to the next starts, before any is served."""
        self.session_error: tuple[grpc.StatusCode, str] | None = None
        """How every new Session ends at once."""
        self.tokens_per_delta = 1
        self.replays_all = False
        """Attach replays from the beginning, as a router may that cannot cut its journal."""
        self.skips = 0
        """Tokens lost on each attach, which no router may."""
        self.goes_away_at_once = False
        self.received_metadata: list[tuple[str, str]] = []
        self._held_at: int | None = None
        self._server: grpc.aio.Server | None = None
        self.port = 0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Serve, on the same port as before if there was one."""
        self._server = grpc.aio.server(
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 4 * 1024 * 1024)]
        )
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(_Models(), self._server)
        status_service_pb2_grpc.add_StatusServiceServicer_to_server(_Status(), self._server)
        health = grpc.unary_unary_rpc_method_handler(
            _check_health,
            request_deserializer=wrappers_pb2.StringValue.FromString,
            response_serializer=wrappers_pb2.Int32Value.SerializeToString,
        )
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": health}),)
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    # What a test does to it.

    def hold(self, num_tokens: int) -> None:
        """Let no answer grow beyond so many tokens until `release`."""
        self._held_at = num_tokens

    def let_grow(self, num_tokens: int) -> None:
        """Let held answers grow to so many tokens."""
        self.hold(num_tokens)
        for request_id in list(self.journals):
            self._pump(request_id)

    def release(self) -> None:
        self._held_at = None
        for request_id in list(self.journals):
            self._pump(request_id)

    def break_sessions(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        """End every Session with `code`; requests live on, unattached."""
        for connection in self.sessions:
            connection.fault = code
            connection.wake.set()
        for journal in self.journals.values():
            journal.connection = None

    def forget(self) -> None:
        """Lose every request, as a router that starts anew."""
        self.journals.clear()

    def announce_go_away(self, grace_s: int = 30) -> None:
        for connection in self.sessions:
            connection.go_away = pb.GoAway(reason="DRAINING")
            connection.go_away.grace.seconds = grace_s
            connection.wake.set()

    # InferenceService.

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the client uses Session")
        yield pb.GenerateResponse()

    async def Session(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.SessionRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.SessionResponse]:
        self.num_sessions += 1
        if self.session_error is not None:
            await context.abort(*self.session_error)
        connection = Connection(context.peer())
        self.sessions.append(connection)
        if self.goes_away_at_once:
            self.announce_go_away()
        reader = asyncio.create_task(self._read(request_iterator, connection))
        try:
            while True:
                await connection.wake.wait()
                connection.wake.clear()
                if connection.fault is not None:
                    await context.abort(connection.fault, "broken by the test")
                events, connection.events = connection.events, []
                go_away, connection.go_away = connection.go_away, None
                if events or go_away:
                    yield pb.SessionResponse(events=events, go_away=go_away)
                if connection.is_half_closed and not connection.events:
                    return
        finally:
            self.sessions.remove(connection)
            for journal in self.journals.values():
                if journal.connection is connection:
                    journal.connection = None
            reader.cancel()
            await asyncio.wait([reader])

    async def _read(self, requests: AsyncIterator[pb.SessionRequest], connection: Connection) -> None:
        async for message in requests:
            self.messages.append(message)
            for start in message.starts:
                self.starts.append(start)
                self._start(start, connection)
            for cancel in message.cancels:
                self.cancels.append(cancel.request_id)
                if self.journals.pop(cancel.request_id, None):
                    connection.send(cancel.request_id, terminal=pb.Terminal(code=1, reason="CANCELLED"))
            for grant in message.grants:
                self.grants.append((grant.request_id, grant.tokens))
                if grant.request_id in self.journals:
                    self.journals[grant.request_id].window += grant.tokens
                    self._pump(grant.request_id)
        connection.is_half_closed = True
        connection.wake.set()

    def _start(self, start: pb.Start, connection: Connection) -> None:
        if self.refusals:
            connection.send(start.request_id, terminal=self.refusals.pop(0))
            return
        journal = self.journals.get(start.request_id)
        received = start.request.received_token_ids
        num_received = len(received[0].ids) if len(received) == 1 else 0  # it knows no other choices
        if journal is None:
            if sum(start.attach_offsets) > num_received:
                terminal = pb.Terminal(code=5, reason="REQUEST_NOT_FOUND", message="no such request")
                connection.send(start.request_id, terminal=terminal)
                return
            total = start.request.max_tokens if start.request.HasField("max_tokens") else DEFAULT_TOKENS
            journal = self.journals[start.request_id] = Journal(start, total)
        elif not start.attach_offsets:
            terminal = pb.Terminal(code=3, reason="REQUEST_ID_IN_USE", message=start.request_id)
            connection.send(start.request_id, terminal=terminal)
            return
        journal.connection = connection
        journal.num_sent = 0 if self.replays_all else max(sum(start.attach_offsets), num_received)
        if start.attach_offsets:
            journal.num_sent += self.skips
        journal.window = start.window if start.HasField("window") else 1 << 30
        if self.replays_all:
            journal.window += sum(start.attach_offsets)
        self._pump(start.request_id)

    def _pump(self, request_id: str) -> None:
        """Send what the answer, the hold and the window allow, and the Terminal after the last token."""
        journal = self.journals[request_id]
        if journal.connection is None:
            return
        available = journal.total if self._held_at is None else min(journal.total, self._held_at)
        while journal.num_sent < available and journal.window > 0:
            first = journal.num_sent
            last = min(first + self.tokens_per_delta, available, first + journal.window)
            delta = types_pb2.Delta(
                text="".join(f"{i} " for i in range(first, last)),
                token_ids=range(FIRST_TOKEN + first, FIRST_TOKEN + last),
                token_offset=first,
            )
            if last == journal.total:
                delta.finish.reason = types_pb2.FINISH_REASON_LENGTH
            journal.num_sent = last
            journal.window -= last - first
            journal.connection.send(request_id, delta=delta)
        if journal.num_sent == journal.total and self._held_at is None:
            usage = types_pb2.Usage(prompt_tokens=3, cached_tokens=1, generated_tokens=journal.total, replica="r1")
            decision = types_pb2.Decision(replica="r1", rule="only", attempt=1)
            terminal = pb.Terminal(usage=usage, decision=decision, replica="r1")
            journal.connection.send(request_id, terminal=terminal)
            del self.journals[request_id]


class _Models(model_service_pb2_grpc.ModelServiceServicer):
    async def ListModels(  # noqa: N802
        self, request: model_service_pb2.ListModelsRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.ListModelsResponse:
        model = model_service_pb2.Model(name="scripted", max_model_len=64, vocab_size=256, has_chat_template=True)
        return model_service_pb2.ListModelsResponse(models=[model])

    async def Tokenize(  # noqa: N802
        self, request: model_service_pb2.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.TokenizeResponse:
        if request.model not in ("", "scripted"):
            await _abort_with_details(context, request.model)
        return model_service_pb2.TokenizeResponse(token_ids=request.prompt.text.encode())

    async def Detokenize(  # noqa: N802
        self, request: model_service_pb2.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> model_service_pb2.DetokenizeResponse:
        return model_service_pb2.DetokenizeResponse(text=bytes(request.token_ids).decode())


class _Status(status_service_pb2_grpc.StatusServiceServicer):
    async def GetStatus(  # noqa: N802
        self, request: status_service_pb2.GetStatusRequest, context: grpc.aio.ServicerContext
    ) -> status_service_pb2.GetStatusResponse:
        replica = status_service_pb2.ReplicaStatus(
            id="r1", model="scripted", state="ready", kernels="torch", dtype="fp32", engine="fake", num_blocks=64
        )
        router = status_service_pb2.RouterStatus(id="router-1", state="serving", uptime_s=12.5)
        return status_service_pb2.GetStatusResponse(version="0.1.0", router=router, replicas=[replica])


async def _check_health(
    request: wrappers_pb2.StringValue, context: grpc.aio.ServicerContext
) -> wrappers_pb2.Int32Value:
    return wrappers_pb2.Int32Value(value=1 if request.value == "" else 2)


async def _abort_with_details(context: grpc.aio.ServicerContext, model: str) -> None:
    """Abort as the contract says errors look: google.rpc.Status with its details in the trailers."""
    details = []
    for message in (
        error_details_pb2.ErrorInfo(reason="MODEL_NOT_FOUND", domain="octavo"),
        error_details_pb2.BadRequest(
            field_violations=[error_details_pb2.BadRequest.FieldViolation(field="model", description="unknown")]
        ),
        error_details_pb2.RetryInfo(retry_delay={"seconds": 1, "nanos": 500_000_000}),
    ):
        detail = any_pb2.Any()
        detail.Pack(message)
        details.append(detail)
    status = status_pb2.Status(code=5, message=f"no model {model!r}", details=details)
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    await context.abort(grpc.StatusCode.NOT_FOUND, status.message)
