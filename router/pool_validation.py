"""EmbedRequest, ScoreRequest, RerankRequest and ClassifyRequest to `Request`s, one for each input.

All violations of one message are reported together, each with its field, the rule and the value, as `validation.py`
does for Generate.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from octavo.names import Reason
from octavo.v1 import pooling_pb2 as pb
from octavo.v1.types_pb2 import TRUNCATE_LEFT, TRUNCATE_RIGHT

from router.model import ServedModel
from router.tokenizer import MAX_INLINE_CHARACTERS
from router.types import PoolTask, Request
from router.validation import MAX_ID_BYTES, MAX_PRIORITY, Envelope, Validator
from router.violations import Violations, check_token_ids
from workers.errors import CapabilityError
from workers.types import CLASSIFY, ModelManifest, SamplingParams

MAX_INPUTS = 2_048
TOKEN_CLASSIFIER = "ForTokenClassification"
"""How the architectures of models end that say something of each token."""
FLOAT_BYTES, INPUT_BYTES, USAGE_BYTES = 4, 24, 512
"""On the wire: a number, what is around those of an input, and all else."""

PoolMessage: TypeAlias = pb.EmbedRequest | pb.ScoreRequest | pb.RerankRequest | pb.ClassifyRequest
_METHODS = {
    pb.POOLING_UNSPECIFIED: "model",
    pb.POOLING_CLS: "cls",
    pb.POOLING_MEAN: "mean",
    pb.POOLING_MAX: "max",
    pb.POOLING_LAST: "last",
}


@dataclass(frozen=True, slots=True)
class Tokenized:
    ids: list[int]
    num_first: int = 0
    """Of a pair: tokens of its first text, with the special ones around it."""


class PoolValidator:
    """`max_bytes`: of an answer."""

    def __init__(self, validator: Validator, max_bytes: int) -> None:
        self._validator = validator
        self._max_bytes = max_bytes

    async def accept(
        self, message: PoolMessage, envelope: Envelope, *, traceparent: str
    ) -> tuple[ServedModel, list[Request]]:
        """Return the model and the valid requests. Raises NotFoundError, InvalidRequestError, NotServedError or
        CapabilityError."""
        name, model = self._validator.model(message.model)
        violations = Violations()
        self._check_common(message, violations)
        if isinstance(message, pb.ScoreRequest | pb.RerankRequest):
            _check_scores(name, model.manifest)
        texts, field = _inputs(message)
        count = len(texts)
        violations.require(1 <= count <= MAX_INPUTS, field, f"must have 1 to {MAX_INPUTS} elements", count)
        if isinstance(message, pb.RerankRequest) and message.HasField("top_n"):
            violations.require(message.top_n >= 1, "top_n", "must be >= 1", message.top_n)
        task = _task(message, violations)
        violations.raise_if_any()
        encoder = _Encoder(model, message.truncate == TRUNCATE_RIGHT, violations)
        is_long = sum(map(_size, texts)) > MAX_INLINE_CHARACTERS
        tokenized = await asyncio.to_thread(encoder.all, texts, field) if is_long else encoder.all(texts, field)
        violations.raise_if_any()
        size = _answer_bytes(message, model.manifest, tokenized)
        rule = f"must have an answer of at most {self._max_bytes} bytes (the router's max_message_bytes)"
        violations.require(size <= self._max_bytes, field, rule, size)
        violations.raise_if_any()
        return model, [
            Request(
                request_id=envelope.request_id,
                model=name,
                prompt=each.ids,
                sampling=_NO_SAMPLING,
                max_tokens=1,
                pool=PoolTask(task.method, task.normalize, each.num_first),
                priority=message.priority,
                tenant=envelope.identity.tenant,
                salt=envelope.identity.salt,
                deadline=envelope.deadline,
                has_own_deadline=envelope.has_own_deadline,
                accepted_at=envelope.accepted_at,
                traceparent=traceparent,
                tracestate=envelope.tracestate,
            )
            for each in tokenized
        ]

    def _check_common(self, message: PoolMessage, violations: Violations) -> None:
        in_range = -MAX_PRIORITY <= message.priority <= MAX_PRIORITY
        violations.require(in_range, "priority", f"must be in [-{MAX_PRIORITY}, {MAX_PRIORITY}]", message.priority)
        size = len(message.client_request_id.encode())
        rule = f"must have at most {MAX_ID_BYTES} bytes"
        violations.require(size <= MAX_ID_BYTES, "client_request_id", rule, size)
        violations.serve(message.truncate != TRUNCATE_LEFT, "truncate", "TRUNCATE_LEFT")


def _check_scores(name: str, manifest: ModelManifest) -> None:
    """Raises CapabilityError."""
    if len(manifest.labels) != 1:
        raise CapabilityError(
            f"{name} has {len(manifest.labels)} labels; scores come of models with one, cross-encoders"
        )
    if manifest.architecture.endswith(TOKEN_CLASSIFIER):
        raise CapabilityError(f"{name} classifies tokens; scores come of models that classify texts, cross-encoders")


def _answer_bytes(message: PoolMessage, manifest: ModelManifest, inputs: Sequence[Tokenized]) -> int:
    """Return how large the answer will be, at most; without its vectors where nobody knows how wide they are."""
    rows, width, others = len(inputs), 1, 0
    if isinstance(message, pb.EmbedRequest):
        width = manifest.embedding_size
    elif isinstance(message, pb.ClassifyRequest):
        width, others = len(manifest.labels), sum(len(label.encode()) + 4 for label in manifest.labels)
        if manifest.architecture.endswith(TOKEN_CLASSIFIER):
            rows = sum(len(each.ids) for each in inputs)
    return rows * width * FLOAT_BYTES + len(inputs) * INPUT_BYTES + others + USAGE_BYTES


_NO_SAMPLING = SamplingParams(temperature=0.0)


def _task(message: PoolMessage, violations: Violations) -> PoolTask:
    if not isinstance(message, pb.EmbedRequest):
        return PoolTask(CLASSIFY, not message.raw)
    method = _METHODS.get(message.pooling)
    violations.require(method is not None, "pooling", "must be a value of Pooling", message.pooling)
    return PoolTask(method or "model", message.normalize if message.HasField("normalize") else None)


_Input: TypeAlias = pb.PoolInput | tuple[str, str]


def _inputs(message: PoolMessage) -> tuple[Sequence[_Input], str]:
    """Return what is to be computed, and the field that it comes from."""
    if isinstance(message, pb.ScoreRequest):
        return [(pair.first, pair.second) for pair in message.pairs], "pairs"
    if isinstance(message, pb.RerankRequest):
        return [(message.query, document) for document in message.documents], "documents"
    return message.inputs, "inputs"


def _size(text: _Input) -> int:
    """Return how many characters or token ids there are to look at."""
    return sum(map(len, text)) if isinstance(text, tuple) else len(text.text) + len(text.token_ids.ids)


class _Encoder:
    """Makes token ids of inputs. Blocks; what is wrong goes to `violations`."""

    def __init__(self, model: ServedModel, truncates: bool, violations: Violations) -> None:
        self._model = model
        self._limit = model.manifest.max_model_len
        self._truncates = truncates
        self._violations = violations

    def all(self, texts: Sequence[_Input], field: str) -> list[Tokenized]:
        return [self._one(text, f"{field}[{i}]") for i, text in enumerate(texts)]

    def _one(self, text: _Input, field: str) -> Tokenized:
        tokenizer, limit = self._model.tokenizer, self._limit if self._truncates else None
        if isinstance(text, tuple):
            found = Tokenized(*tokenizer.encode_pair(*text, limit))
        elif text.WhichOneof("input") == "text":
            found = Tokenized(tokenizer.encode_at_most(text.text, limit))
        else:
            ids = list(text.token_ids.ids)
            check_token_ids(ids, f"{field}.token_ids", self._model, self._violations)
            found = Tokenized(ids[:limit])
        count = len(found.ids)
        if not count:
            rule = "must have at least one token, as text or token ids"
            self._violations.require(False, field, rule, "empty", reason=Reason.EMPTY_PROMPT)
        if count > self._limit:
            rule = f"must have at most {self._limit} tokens (the model's context)"
            self._violations.require(False, field, rule, f"{count} tokens", reason=Reason.PROMPT_TOO_LONG)
        return found
