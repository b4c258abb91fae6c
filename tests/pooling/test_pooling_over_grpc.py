"""Embed, Score, Rerank and Classify from a client to a real engine and back, against transformers computing alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from octavo.client import (
    CallError,
    DeadlineExceededError,
    InvalidArgumentError,
)
from octavo.client.errors import from_rpc
from octavo.names import Reason
from octavo.v1 import pooling_pb2
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub
from tokenizers import Tokenizer
from torch.nn.functional import normalize

from router.dispatcher import MAX_IDLE_LOSSES
from tests.data_plane.rig import until
from tests.pooling.conftest import NewServed, Served
from tests.pooling.tiny_encoders import save_encoder, say_pooling
from workers.models.encoder import EncoderModel

TEXTS = ["the cat sat on the mat", "ray schedules actors over many machines", "cat", "tokens and tokens and the engine"]
POOL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda rows: rows[0],
    "mean": lambda rows: rows.mean(0),
    "max": lambda rows: rows.max(0).values,
    "last": lambda rows: rows[-1],
}


def encoded(directory: Path, *text: str) -> dict[str, torch.Tensor]:
    found = Tokenizer.from_file(str(directory / "tokenizer.json")).encode(*text)
    return {"input_ids": torch.tensor([found.ids]), "token_type_ids": torch.tensor([found.type_ids])}


@torch.inference_mode()
def alone(model: Any, directory: Path, *text: str) -> Any:
    given = encoded(directory, *text)
    if "token_type_ids" not in model.forward.__code__.co_varnames and "Bert" not in type(model).__name__:
        del given["token_type_ids"]
    return model(**given)


def assert_near(found: Any, expected: torch.Tensor) -> None:
    assert (torch.tensor(found) - expected).abs().max().item() < 1e-5


@pytest.mark.parametrize("kind", ["Bert", "Qwen3"])
async def test_embeddings_are_those_of_transformers(kind: str, serve: NewServed, tmp_path: Path) -> None:
    changes = {"num_key_value_heads": 2, "head_dim": 16} if kind == "Qwen3" else {}
    plain = save_encoder(tmp_path / "m", kind, **changes)
    rows = [alone(plain, tmp_path / "m", text).last_hidden_state[0] for text in TEXTS]
    async with serve(tmp_path / "m") as served:
        for method, pool in POOL.items():
            expected = torch.stack([pool(each) for each in rows])
            assert_near(await served.client.embed(TEXTS, pooling=method), expected)
            units = await served.client.embed(TEXTS, pooling=method, normalize=True)
            assert_near(units, normalize(expected, dim=-1))


async def test_the_models_own_pooling_is_the_default(serve: NewServed, tmp_path: Path) -> None:
    plain = save_encoder(tmp_path / "m", "Bert")
    say_pooling(tmp_path / "m", "cls_token", normalizes=True)
    expected = torch.stack([alone(plain, tmp_path / "m", text).last_hidden_state[0, 0] for text in TEXTS])
    async with serve(tmp_path / "m") as served:
        assert_near(await served.client.embed(TEXTS), normalize(expected, dim=-1))
        assert_near(await served.client.embed(TEXTS, pooling="cls", normalize=False), expected)


@pytest.mark.parametrize("num_labels", [1, 3])
async def test_sequences_are_classified(num_labels: int, serve: NewServed, tmp_path: Path) -> None:
    plain = save_encoder(tmp_path / "m", "Bert", "ForSequenceClassification", num_labels=num_labels)
    logits = torch.cat([alone(plain, tmp_path / "m", text).logits for text in TEXTS])
    async with serve(tmp_path / "m") as served:
        found = await served.client.classify(TEXTS)
        assert_near([each.rows[0] for each in found], logits.sigmoid() if num_labels == 1 else logits.softmax(-1))
        assert found[0].labels == [f"LABEL_{i}" for i in range(num_labels)]
        raw = await served.client.classify(TEXTS, raw=True)
        assert_near([each.rows[0] for each in raw], logits)


async def test_tokens_are_classified(serve: NewServed, tmp_path: Path) -> None:
    plain = save_encoder(tmp_path / "m", "Bert", "ForTokenClassification", num_labels=3)
    async with serve(tmp_path / "m") as served:
        for text, found in zip(TEXTS, await served.client.classify(TEXTS), strict=True):
            assert_near(found.rows, alone(plain, tmp_path / "m", text).logits[0].softmax(-1))


async def test_pairs_are_scored_and_ranked(serve: NewServed, tmp_path: Path) -> None:
    plain = save_encoder(tmp_path / "m", "Bert", "ForSequenceClassification", num_labels=1)
    query = "the cat computes"
    logits = torch.cat([alone(plain, tmp_path / "m", query, text).logits[0] for text in TEXTS])
    async with serve(tmp_path / "m") as served:
        assert_near(await served.client.score([(query, text) for text in TEXTS]), logits.sigmoid())
        ranked = await served.client.rerank(query, TEXTS, top_n=3, raw=True)
        assert [index for index, _ in ranked] == logits.argsort(descending=True)[:3].tolist()
        assert_near([score for _, score in ranked], logits.sort(descending=True).values[:3])


async def test_too_long_inputs_are_refused_or_cut(serve: NewServed, tmp_path: Path) -> None:
    plain = save_encoder(tmp_path / "m", "Bert")
    long = " ".join(["cat"] * 60)
    async with serve(tmp_path / "m") as served:
        with pytest.raises(InvalidArgumentError) as caught:
            await served.client.embed(["cat", long, ""])
        fields = [violation.field for violation in caught.value.field_violations]
        assert fields == ["inputs[1]"]
        cut = await served.client.embed([long], pooling="mean", truncate=True)
        rows = alone(plain, tmp_path / "m", " ".join(["cat"] * 38)).last_hidden_state[0]
        assert_near(cut[0], rows.mean(0))


class Slow:
    """Holds an engine's computations up until it is told otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        plain = EncoderModel.pool

        def pool(model: EncoderModel, works: Any) -> Any:
            if len(works[0].tokens) > 1:  # not the one that warms it
                self.go.wait(30)
            return plain(model, works)

        monkeypatch.setattr(EncoderModel, "pool", pool)


async def until_idle(served: Served) -> None:
    await until(lambda: not served.num_works and not served.server.intake.num_open)


async def test_deadline_and_cancel_end_all_inputs(
    serve: NewServed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(tmp_path / "m", "Bert")
    slow = Slow(monkeypatch)
    async with serve(tmp_path / "m", chunk_tokens=4) as served:
        with pytest.raises(DeadlineExceededError):
            await served.client.embed(TEXTS, timeout=0.3)
        asking = asyncio.create_task(served.client.embed(TEXTS))
        await asyncio.sleep(0.2)
        asking.cancel()
        slow.go.set()
        await asyncio.gather(asking, return_exceptions=True)
        await until_idle(served)
        assert len(await served.client.embed(TEXTS)) == len(TEXTS)


async def test_a_lost_replica_costs_no_input(serve: NewServed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = save_encoder(tmp_path / "m", "Bert")
    slow = Slow(monkeypatch)
    async with serve(tmp_path / "m", num_replicas=2, chunk_tokens=4) as served:
        asking = asyncio.create_task(served.client.embed(TEXTS * 4, pooling="cls"))
        await until(lambda: served.replicas[0].num_works > 0)
        await served.lose(0)
        slow.go.set()
        expected = torch.stack([alone(plain, tmp_path / "m", text).last_hidden_state[0, 0] for text in TEXTS * 4])
        assert_near(await asking, expected)


async def test_what_loses_every_replica_is_given_up(
    serve: NewServed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be what kills them: the last one is spared, and serves others."""
    save_encoder(tmp_path / "m", "Bert")
    slow = Slow(monkeypatch)
    async with serve(tmp_path / "m", num_replicas=MAX_IDLE_LOSSES + 1) as served:
        stub: Any = InferenceServiceStub(channel := served.client._dial(served.client._targets[0]))
        request = pooling_pb2.EmbedRequest(inputs=[pooling_pb2.PoolInput(text="cat")])
        asking = asyncio.ensure_future(stub.Embed(request, timeout=60))
        alive = set(range(MAX_IDLE_LOSSES + 1))
        for _ in range(MAX_IDLE_LOSSES):
            await until(lambda: any(served.replicas[i].num_works for i in alive))
            lost = next(i for i in alive if served.replicas[i].num_works)
            alive.remove(lost)
            await served.lose(lost)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asking
        assert from_rpc(caught.value).reason == Reason.REPLICA_LOST
        slow.go.set()
        assert len(await served.client.embed(["cat"])) == 1
        await channel.close()


async def test_an_input_that_fails_fails_its_call_alone(
    serve: NewServed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_encoder(tmp_path / "m", "Bert")
    plain = EncoderModel.pool

    def pool(model: EncoderModel, works: Any) -> Any:
        if any(5 in work.tokens for work in works):  # "cat"
            raise RuntimeError("a kernel failed")
        return plain(model, works)

    monkeypatch.setattr(EncoderModel, "pool", pool)
    async with serve(tmp_path / "m") as served:
        bad, good = await asyncio.gather(
            served.client.embed(["cat", "mat"]), served.client.embed(["mat"]), return_exceptions=True
        )
        assert isinstance(bad, CallError)
        assert bad.reason == Reason.INTERNAL
        assert isinstance(good, list)
