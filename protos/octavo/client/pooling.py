"""What `Client.embed`, `score`, `rerank` and `classify` send and give back: requests made, responses read.

Options are the fields of the requests by their own names; see octavo/v1/pooling.proto.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import grpc.aio

from octavo.client.request import Prompt, invalid
from octavo.v1 import inference_service_pb2_grpc, pooling_pb2, types_pb2

_T = TypeVar("_T")
_M = TypeVar("_M")

POOLINGS = {"cls": 1, "mean": 2, "max": 3, "last": 4}


class PoolOptions(TypedDict, total=False):
    model: str
    raw: bool
    truncate: bool
    """Drop the end of what is too long, instead of an error."""
    priority: int
    client_request_id: str


class RerankOptions(PoolOptions, total=False):
    top_n: int


class EmbedOptions(TypedDict, total=False):
    model: str
    pooling: str
    """"cls", "mean", "max" or "last"; by default what the model's files say."""
    normalize: bool
    truncate: bool
    priority: int
    client_request_id: str


class Classification(NamedTuple):
    labels: list[str]
    rows: list[list[float]]
    """One with a number for each label; of a model that classifies tokens one for each token."""

    @property
    def label(self) -> str:
        """The likeliest of the first row."""
        return self.labels[max(range(len(self.labels)), key=self.rows[0].__getitem__)]


class CallOptions(NamedTuple):
    timeout: float | None
    metadata: Any


Call = Callable[[grpc.aio.Channel], Awaitable[Any]]


def embed(inputs: Sequence[Prompt], call: CallOptions, options: EmbedOptions) -> Call:
    fields = _fields(options)
    if "pooling" in fields:
        if fields["pooling"] not in POOLINGS:
            raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, is {fields['pooling']!r}")
        fields["pooling"] = POOLINGS[fields["pooling"]]
    request = pooling_pb2.EmbedRequest(inputs=_inputs(inputs), **fields)

    async def ask(channel: grpc.aio.Channel) -> list[list[float]]:
        response = await _stub(channel).Embed(request, timeout=call.timeout, metadata=call.metadata)
        return [list(embedding.values) for embedding in response.embeddings]

    return ask


def score(pairs: Sequence[tuple[str, str]], call: CallOptions, options: PoolOptions) -> Call:
    request = pooling_pb2.ScoreRequest(pairs=_made("pairs", pairs, _pair), **_fields(options))

    async def ask(channel: grpc.aio.Channel) -> list[float]:
        response = await _stub(channel).Score(request, timeout=call.timeout, metadata=call.metadata)
        return list(response.scores)

    return ask


def rerank(query: str, documents: Sequence[str], call: CallOptions, options: RerankOptions) -> Call:
    texts = _made("documents", documents, _text)
    request = pooling_pb2.RerankRequest(query=_written("query", query, _text), documents=texts, **_fields(options))

    async def ask(channel: grpc.aio.Channel) -> list[tuple[int, float]]:
        response = await _stub(channel).Rerank(request, timeout=call.timeout, metadata=call.metadata)
        return [(document.index, document.score) for document in response.documents]

    return ask


def classify(inputs: Sequence[Prompt], call: CallOptions, options: PoolOptions) -> Call:
    request = pooling_pb2.ClassifyRequest(inputs=_inputs(inputs), **_fields(options))

    async def ask(channel: grpc.aio.Channel) -> list[Classification]:
        response = await _stub(channel).Classify(request, timeout=call.timeout, metadata=call.metadata)
        labels = list(response.labels)
        found = []
        for each in response.classifications:
            scores, width = list(each.scores), len(each.scores) // max(1, each.rows)
            rows = [scores[row * width : (row + 1) * width] for row in range(each.rows)]
            found.append(Classification(labels, rows))
        return found

    return ask


def _stub(channel: grpc.aio.Channel) -> Any:
    return inference_service_pb2_grpc.InferenceServiceStub(channel)


def _fields(options: Any) -> dict[str, Any]:
    fields = dict(options)
    if fields.pop("truncate", False):
        fields["truncate"] = types_pb2.TRUNCATE_RIGHT
    return fields


def _inputs(inputs: Sequence[Prompt]) -> list[pooling_pb2.PoolInput]:
    return _made("inputs", inputs, _input)


def _made(field: str, given: Sequence[_T], make: Callable[[_T], _M]) -> list[_M]:
    """Return what `make` makes of each. Raises InvalidArgumentError; for one text, too, of which each character would
    be one otherwise."""
    if isinstance(given, str | bytes):
        raise invalid(field, f"must be a list, is {type(given).__name__}")
    return [_written(f"{field}[{i}]", each, make) for i, each in enumerate(given)]


def _written(field: str, given: _T, make: Callable[[_T], _M]) -> _M:
    try:
        return make(given)
    except (TypeError, ValueError) as error:  # for instance a lone surrogate
        raise invalid(field, str(error)) from None


def _input(text: Prompt) -> pooling_pb2.PoolInput:
    if isinstance(text, str):
        return pooling_pb2.PoolInput(text=text)
    ids: Any = text
    return pooling_pb2.PoolInput(token_ids=types_pb2.TokenIds(ids=ids))


def _pair(texts: tuple[str, str]) -> pooling_pb2.TextPair:
    if isinstance(texts, str):
        raise TypeError("must be two texts, is one")
    first, second = texts
    return pooling_pb2.TextPair(first=first, second=second)


def _text(text: str) -> str:
    return pooling_pb2.TextPair(first=text).first
