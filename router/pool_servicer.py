"""Embed, Score, Rerank and Classify as gRPC sees them: one message in, one out, or a status for the whole call."""

from __future__ import annotations

import asyncio
import time
from typing import Any, TypeVar

import grpc.aio
from octavo.names import Span
from octavo.v1 import pooling_pb2 as pb
from octavo.v1.types_pb2 import Usage

from router import status
from router.intake import Intake
from router.model import ServedModel
from router.pool_call import PoolCall
from router.pool_validation import PoolMessage
from workers.errors import CancelledRequestError, DeadlineError, OctavoError

T = TypeVar("T", pb.EmbedResponse, pb.ScoreResponse, pb.RerankResponse, pb.ClassifyResponse)
Context = grpc.aio.ServicerContext[Any, Any]


class PoolServicer:
    """What `InferenceServicer` serves beside Generate and Session."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake

    async def embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        call, _ = await self._answered(request, context, Span.EMBED)
        embeddings = [pb.Embedding(values=vector) for vector in call.vectors]
        return pb.EmbedResponse(embeddings=embeddings, usage=_usage(call))

    async def score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        call, _ = await self._answered(request, context, Span.SCORE)
        return pb.ScoreResponse(scores=[vector[0] for vector in call.vectors], usage=_usage(call))

    async def rerank(self, request: pb.RerankRequest, context: Context) -> pb.RerankResponse:
        call, _ = await self._answered(request, context, Span.RERANK)
        scores = [vector[0] for vector in call.vectors]
        order = sorted(range(len(scores)), key=lambda i: -scores[i])
        if request.HasField("top_n"):
            order = order[: request.top_n]
        documents = [pb.RankedDocument(index=i, score=scores[i]) for i in order]
        return pb.RerankResponse(documents=documents, usage=_usage(call))

    async def classify(self, request: pb.ClassifyRequest, context: Context) -> pb.ClassifyResponse:
        call, model = await self._answered(request, context, Span.CLASSIFY)
        labels = model.manifest.labels
        return pb.ClassifyResponse(
            classifications=[
                pb.Classification(scores=vector, rows=len(vector) // max(1, len(labels))) for vector in call.vectors
            ],
            labels=labels,
            usage=_usage(call),
        )

    async def _answered(self, request: PoolMessage, context: Context, name: str) -> tuple[PoolCall, ServedModel]:
        """Return the call when all is there; whatever goes wrong ends it with a status."""
        try:
            envelope = self._intake.envelope(request.client_request_id, context)
        except OctavoError as error:
            self._intake.observer.refused(request.model, error.reason)
            await status.abort(context, error)
        call = self._intake.open_pool(envelope, name=name, model=request.model)
        try:
            model = await self._intake.admit_pool(call, request)
            await call.wait()
            return call, model
        except OctavoError as error:
            call.fail(error)
            await status.abort(context, call.error or error)
        except asyncio.CancelledError:
            is_late = time.monotonic() >= envelope.deadline - 0.001
            call.fail(DeadlineError("the deadline passed") if is_late else CancelledRequestError("the client left"))
            raise
        except Exception as error:
            unexpected = status.unexpected(error)
            call.fail(unexpected)
            await status.abort(context, unexpected)
        finally:
            self._intake.close_pool(call)


def _usage(call: PoolCall) -> Usage:
    usage = Usage()
    call.accounts.fill_usage(usage, num_prompt=call.num_prompt, num_generated=0)
    return usage
