"""What Embed, Score, Rerank and Classify refuse, and with which words: bad input, and what a model cannot do."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from octavo.client import FailedPreconditionError, InvalidArgumentError, UnimplementedError
from octavo.client.errors import from_rpc
from octavo.names import Reason
from octavo.v1 import pooling_pb2, types_pb2
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from cluster.models import fetch_model
from tests.pooling.conftest import NewServed
from tests.pooling.tiny_encoders import save_encoder
from workers.build import build_engine
from workers.config import EngineConfig
from workers.errors import ConfigError

BAD = {
    "no inputs": (pooling_pb2.EmbedRequest(), "inputs"),
    "an unknown pooling": (pooling_pb2.EmbedRequest(inputs=[pooling_pb2.PoolInput(text="a")], pooling=9), "pooling"),
    "a large priority": (pooling_pb2.EmbedRequest(inputs=[pooling_pb2.PoolInput(text="a")], priority=999), "priority"),
    "a token beyond": (
        pooling_pb2.EmbedRequest(inputs=[pooling_pb2.PoolInput(token_ids=types_pb2.TokenIds(ids=[3, 999]))]),
        "inputs[0].token_ids",
    ),
    "nothing in it": (pooling_pb2.EmbedRequest(inputs=[pooling_pb2.PoolInput()]), "inputs[0]"),
}


async def test_bad_requests_say_field_and_rule(serve: NewServed, tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", "Bert")
    async with serve(tmp_path / "m") as served:
        channel = served.client._dial(served.client._targets[0])
        stub: Any = InferenceServiceStub(channel)
        for name, (request, field) in BAD.items():
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Embed(request, timeout=30)
            error = from_rpc(caught.value)
            assert isinstance(error, InvalidArgumentError), name
            assert any(violation.field.startswith(field) for violation in error.field_violations), name
        left = pooling_pb2.EmbedRequest(inputs=[pooling_pb2.PoolInput(text="a")], truncate=types_pb2.TRUNCATE_LEFT)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Embed(left, timeout=30)
        assert isinstance(from_rpc(caught.value), UnimplementedError)
        await channel.close()


async def test_what_a_model_cannot_do_is_refused(serve: NewServed, tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", "Bert")
    async with serve(tmp_path / "m") as served:
        for call in (
            served.client.score([("a", "b")]),
            served.client.rerank("a", ["b"]),
            served.client.classify(["a"]),
            served.client.complete("a", max_tokens=1),
        ):
            with pytest.raises(FailedPreconditionError) as caught:
                await call
            assert caught.value.reason == Reason.ENGINE_CAPABILITY
        assert "no replica of this model" in str(caught.value), "the router did not refuse it by itself"


async def test_a_model_that_generates_does_not_embed(serve: NewServed, tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", "Llama", "ForCausalLM")
    async with serve(tmp_path / "m") as served:
        with pytest.raises(FailedPreconditionError) as caught:
            await served.client.embed(["cat"])
        assert caught.value.reason == Reason.ENGINE_CAPABILITY
        completion = await served.client.complete("the cat", max_tokens=4, temperature=0.0)
        assert len(completion.token_ids) == 4


async def test_bad_pairs_and_documents_say_field_and_rule(serve: NewServed, tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", "Bert", "ForSequenceClassification", num_labels=1)
    long = " ".join(["cat"] * 30)
    async with serve(tmp_path / "m") as served:
        client = served.client
        bad: dict[str, Awaitable[Any]] = {
            "pairs": client.score([]),
            "pairs[1]": client.score([("cat", "mat"), (long, long)]),
            "documents": client.rerank("cat", []),
            "documents[0]": client.rerank("cat", [f"{long} {long}", "mat"]),
            "top_n": client.rerank("cat", ["mat"], top_n=0),
        }
        for field, call in bad.items():
            with pytest.raises(InvalidArgumentError) as caught:
                await call
            assert [violation.field for violation in caught.value.field_violations] == [field]
        for call in (client.embed(["cat"]), client.complete("cat", max_tokens=1)):
            with pytest.raises(FailedPreconditionError):
                await call
        assert len(await client.rerank("", ["", "mat"], top_n=9)) == 2, "an empty text is one, and two are all"
        assert len(await client.score([(long, long)], truncate=True)) == 1


async def test_a_model_that_classifies_tokens_does_not_score(serve: NewServed, tmp_path: Path) -> None:
    """It has one label, as a cross-encoder has; its first token's number is no score of a pair."""
    save_encoder(tmp_path / "m", "Bert", "ForTokenClassification", num_labels=1)
    async with serve(tmp_path / "m") as served:
        for call in (served.client.score([("cat", "mat")]), served.client.rerank("cat", ["mat"])):
            with pytest.raises(FailedPreconditionError, match="classifies tokens") as caught:
                await call
            assert caught.value.reason == Reason.ENGINE_CAPABILITY
        assert len((await served.client.classify(["cat"]))[0].rows) == 3


@pytest.mark.parametrize("head", ["Model", "ForTokenClassification"])
async def test_an_answer_that_no_message_can_carry_is_refused_before_it_is_computed(
    head: str, serve: NewServed, tmp_path: Path
) -> None:
    """gRPC would refuse it once all is computed, without a reason."""
    save_encoder(tmp_path / "m", "Bert", head, **({"num_labels": 24} if head != "Model" else {}))
    async with serve(tmp_path / "m", max_message_bytes=20_000) as served:
        ask: Any = served.client.embed if head == "Model" else served.client.classify
        most = 90 if head == "Model" else 61  # of 48 numbers each; of 3 tokens with 24
        with pytest.raises(InvalidArgumentError, match="inputs: must have an answer of at most 20000 bytes") as caught:
            await ask(["cat"] * (most + 1))
        assert caught.value.reason == Reason.INVALID_FIELD
        assert served.engines[0].load().num_computed_tokens == 1, "more than the warm-up was computed"
        assert len(await ask(["cat"] * most)) == most


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": "bf16"},
        {"lookup_tokens": 3},
        {"reserve": True},
        {"kernels": "native"},
        {"weights": "int8"},
        {"max_model_len": 41},
    ],
)
def test_a_key_that_such_a_model_cannot_follow_is_refused(given: dict[str, Any], tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", "Bert")
    files = fetch_model(str(tmp_path / "m"), cache_dir=tmp_path / "cache", any_architecture=True)
    (key,) = given
    with pytest.raises(ConfigError, match=rf"engine\.{key} must be "):
        build_engine(EngineConfig(engine="transformers", **given), files, hash_key=b"", threads=1)
