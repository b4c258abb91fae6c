"""ModelService: what is served, and its tokenizer."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import grpc.aio
from octavo.v1 import model_service_pb2 as models_pb
from octavo.v1.model_service_pb2_grpc import ModelServiceServicer

from router import status
from router.model import Models, ServedModel
from router.prompt import prompt_ids
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
