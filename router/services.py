"""ModelService and StatusService: what is served, its tokenizer, and the cluster as this router sees it."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import grpc.aio
from octavo.v1 import model_service_pb2 as models_pb
from octavo.v1 import status_service_pb2 as status_pb
from octavo.v1.model_service_pb2_grpc import ModelServiceServicer
from octavo.v1.status_service_pb2_grpc import StatusServiceServicer

from router import status
from router.intake import Intake
from router.model import Models, ServedModel
from router.prompt import prompt_ids
from router.sessions import Sessions
from router.types import Backend, ReplicaView
from router.validation import Validator
from router.violations import Violations, check_token_ids
from workers.errors import OctavoError
from workers.types import CAPABILITY_GENERATE

T = TypeVar("T")


class ModelServicer(ModelServiceServicer):
    def __init__(self, models: Models, backend: Backend, validator: Validator) -> None:
        self._models = models
        self._backend = backend
        self._validator = validator

    async def ListModels(  # noqa: N802
        self, request: models_pb.ListModelsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb.ListModelsResponse:
        replicas = self._backend.replicas()
        return models_pb.ListModelsResponse(
            models=[
                _model(name, model, _capabilities(name, replicas))
                for name, model in self._models.items()
                if isinstance(model, ServedModel)
            ]
        )

    async def Tokenize(  # noqa: N802
        self, request: models_pb.TokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb.TokenizeResponse:
        return await _answered(self._tokenize(request), context)

    async def Detokenize(  # noqa: N802
        self, request: models_pb.DetokenizeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb.DetokenizeResponse:
        return await _answered(self._detokenize(request), context)

    async def _tokenize(self, request: models_pb.TokenizeRequest) -> models_pb.TokenizeResponse:
        _, model = self._validator.model(request.model)
        violations = Violations()
        token_ids = await prompt_ids(request.prompt, model, violations)
        violations.raise_if_any()
        return models_pb.TokenizeResponse(token_ids=token_ids, max_model_len=model.manifest.max_model_len)

    async def _detokenize(self, request: models_pb.DetokenizeRequest) -> models_pb.DetokenizeResponse:
        _, model = self._validator.model(request.model)
        violations = Violations()
        check_token_ids(request.token_ids, "token_ids", model, violations)
        violations.raise_if_any()
        skips = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await model.tokenizer.decode(request.token_ids, skip_special_tokens=skips)
        return models_pb.DetokenizeResponse(text=text)


class StatusServicer(StatusServiceServicer):
    def __init__(self, backend: Backend, intake: Intake, sessions: Sessions, *, router_id: str, version: str) -> None:
        self._backend = backend
        self._intake = intake
        self._sessions = sessions
        self._router_id = router_id
        self._version = version
        self._started_at = time.monotonic()

    async def GetStatus(  # noqa: N802
        self, request: status_pb.GetStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> status_pb.GetStatusResponse:
        backlog = self._backend.backlog()
        return status_pb.GetStatusResponse(
            version=self._version,
            router=status_pb.RouterStatus(
                id=self._router_id,
                state="draining" if self._intake.is_draining else "serving",
                uptime_s=time.monotonic() - self._started_at,
                num_queued_requests=backlog.num_queued_requests,
                num_queued_tokens=backlog.num_queued_tokens,
                num_running_requests=backlog.num_running_requests,
                max_queued_tokens=backlog.max_queued_tokens,
                num_accepted_total=self._intake.num_accepted,
                num_ended_total=self._intake.num_ended,
                num_sessions=self._sessions.num_open,
                pid=os.getpid(),
            ),
            replicas=[_replica(view) for view in self._backend.replicas()],
        )


async def _answered(answer: Awaitable[T], context: grpc.aio.ServicerContext[Any, Any]) -> T:
    """Await a unary answer; whatever goes wrong becomes the call's status."""
    try:
        return await answer
    except OctavoError as error:
        await status.abort(context, error)
    except Exception as error:
        await status.abort(context, status.unexpected(error))


def _capabilities(name: str, replicas: Sequence[ReplicaView]) -> frozenset[str]:
    """Return what some connected replica of model `name` can do; without one, what every engine can."""
    known = [view.capabilities for view in replicas if view.state == "ready" and view.model == name]
    return frozenset({CAPABILITY_GENERATE}).union(*known)


def _model(name: str, model: ServedModel, capabilities: frozenset[str]) -> models_pb.Model:
    manifest = model.manifest
    return models_pb.Model(
        name=name,
        max_model_len=manifest.max_model_len,
        vocab_size=manifest.vocab_size,
        eos_token_ids=manifest.eos_token_ids,
        has_chat_template=model.chat_template is not None,
        capabilities=sorted(capabilities),
        model_fingerprint=manifest.model_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
    )


def _replica(view: ReplicaView) -> status_pb.ReplicaStatus:
    load = view.load
    return status_pb.ReplicaStatus(
        id=view.replica_id,
        model=view.model,
        state=view.state,
        detail=view.detail,
        address=view.address,
        pid=view.pid,
        node_id=view.node_id,
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_blocks=load.num_blocks,
        num_free_blocks=load.num_free_blocks,
        block_size=view.block_size,
        owed_prefill_tokens=load.owed_prefill_tokens,
        prefix_cache_queries=load.prefix_cache_queries,
        prefix_cache_hits=load.prefix_cache_hits,
        num_preemptions=load.num_preemptions,
        num_drafted_tokens=load.num_drafted_tokens,
        num_accepted_tokens=load.num_accepted_tokens,
        kernels=view.kernels,
        dtype=view.dtype,
        engine=view.engine,
        epoch=view.epoch,
    )
