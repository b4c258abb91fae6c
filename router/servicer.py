"""InferenceService as gRPC sees it. Generate: one request, its answer streamed, all that is available in each message.

Session is one stream of many requests, see ``router/session.py``. A Generate call's cancellation or deadline ends its
request; its trailers say which replica answered and how much of the prompt it had cached.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from octavo.names import Metadata, Span
from octavo.v1 import pooling_pb2 as pb
from octavo.v1.inference_service_pb2 import GenerateRequest, GenerateResponse, SessionRequest
from octavo.v1.inference_service_pb2_grpc import InferenceServiceServicer

from router import status
from router.answer import MAX_MESSAGE_TOKENS, Answer
from router.intake import Intake
from router.pool_servicer import Context, PoolServicer
from router.sessions import Sessions
from router.stream_writer import StreamWriter
from router.validation import MAX_ID_BYTES
from workers.errors import CancelledRequestError, DeadlineError, OctavoError, OverloadedError

MAX_FIRST_BYTES = 1_024
"""A first message of at most so many goes together with the initial metadata, a turn of gRPC's threads earlier. It
fits in any client's window; of one that has none at all, the call could only be left, without a status of ours."""
MAX_LAST_BYTES = 16_384
"""A larger last message goes ahead of the one with the status, which nobody could break off if the client does not
read it."""


class InferenceServicer(InferenceServiceServicer):
    def __init__(self, intake: Intake, sessions: Sessions) -> None:
        self._intake = intake
        self._sessions = sessions
        self._pools = PoolServicer(intake)

    async def Generate(  # type: ignore[override]  # noqa: N802  (the stubs know only the form with yield)
        self, request: GenerateRequest, context: grpc.aio.ServicerContext[GenerateRequest, GenerateResponse]
    ) -> bytes:
        """Write all messages but the last one, and return that; both serialised, see `router/server.py`."""
        ready = asyncio.Event()
        try:
            envelope = self._intake.envelope(request.client_request_id, context)
        except OctavoError as error:
            self._intake.observer.refused(request.model, error.reason)
            await status.abort(context, error)
        answer = self._intake.open(
            envelope, name=Span.GENERATE, model=request.model, on_ready=lambda _answer: ready.set()
        )
        writer = self._intake.open_writer(context)
        try:
            await self._intake.admit(answer, request)
            return await _Reply(context, writer).stream(answer, ready)
        except asyncio.CancelledError:
            # The client left, or the call's deadline passed: gRPC tells both in the same way.
            is_late = time.monotonic() >= envelope.deadline - 0.001
            answer.fail(DeadlineError("the deadline passed") if is_late else CancelledRequestError("the client left"))
            raise
        finally:
            self._intake.close_writer(writer)
            answer.close()

    async def Session(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[SessionRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        await self._sessions.serve(context)

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:  # noqa: N802
        return await self._pools.embed(request, context)

    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:  # noqa: N802
        return await self._pools.score(request, context)

    async def Rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:  # noqa: N802
        return await self._pools.rerank(request, context)

    async def Classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:  # noqa: N802
        return await self._pools.classify(request, context)


class _Reply:
    """Writes one answer to one Generate call."""

    def __init__(
        self,
        context: grpc.aio.ServicerContext[GenerateRequest, GenerateResponse],
        writer: StreamWriter,
    ) -> None:
        self._context = context
        self._writer = writer
        self._has_begun = False

    async def stream(self, answer: Answer, ready: asyncio.Event) -> bytes:
        """Return the last message when all before it is written; raises, as `context.abort` does, if the answer ends
        with an error."""
        while True:
            await ready.wait()
            ready.clear()
            while answer.has_output:
                message = GenerateResponse()
                answer.take(MAX_MESSAGE_TOKENS, message.deltas.add)
                if answer.is_complete and answer.error is None:
                    if message.ByteSize() > MAX_LAST_BYTES:
                        await self._write(message.SerializeToString(), answer)
                        message = GenerateResponse()
                    return self._last(message, answer)
                if message.deltas or answer.error is None:
                    await self._write(message.SerializeToString(), answer)
                if answer.is_complete and answer.error is not None:
                    await self._abort(answer.error, answer)

    def _last(self, message: GenerateResponse, answer: Answer) -> bytes:
        answer.fill_usage(message.usage)
        if answer.accounts.decision is not None:
            answer.accounts.fill_decision(message.decision)
        self._context.set_trailing_metadata(_trailers(answer))
        return message.SerializeToString()

    async def _write(self, message: bytes, answer: Answer) -> None:
        is_first, self._has_begun = not self._has_begun, True
        if is_first and len(message) > MAX_FIRST_BYTES:
            # Apart from the first message: if that got stuck, the call could not be aborted any more.
            await self._context.send_initial_metadata(())
            is_first = False
        try:
            await self._writer.write(message)
        except OverloadedError as error:
            answer.fail(error)
            if is_first:
                raise asyncio.CancelledError from None
            await self._abort(answer.error or error, answer)

    async def _abort(self, error: OctavoError, answer: Answer) -> None:
        await status.abort(self._context, error, _trailers(answer))


def _trailers(answer: Answer) -> tuple[tuple[str, str], ...]:
    trailers = {
        Metadata.REQUEST_ID: answer.request_id,
        Metadata.CACHED_TOKENS: str(answer.accounts.num_cached),
        Metadata.REPLICA: answer.accounts.replica,
    }
    return tuple((key, value) for key, value in trailers.items() if value and _is_header(value))


def _is_header(value: str) -> bool:
    """Whether gRPC takes `value` as it is. A client may name its request as it likes."""
    return len(value) <= MAX_ID_BYTES and value.isascii() and value.isprintable()
