"""A cluster whose engines are transformers': one model that embeds and one that generates, both small and random."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from octavo.client import Client, FailedPreconditionError
from octavo.names import Reason

from tests.cluster import ClusterProcess, running
from tests.pooling.tiny_encoders import save_encoder

pytestmark = pytest.mark.cluster

CONFIG = """
[engine]
engine = "transformers"
threads = 1
num_blocks = 64
[models.embedder]
model = "{folder}/embedder"
[models.decoder]
model = "{folder}/decoder"
"""
TOKENS = [4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, torch.nn.Module]:
    """The same models, computed by transformers alone."""
    return {
        "embedder": save_encoder(folder / "embedder", "Bert"),
        "decoder": save_encoder(folder / "decoder", "Llama", "ForCausalLM"),
    }


@pytest.fixture(scope="module")
def cluster(folder: Path, plain: dict[str, torch.nn.Module]) -> Iterator[ClusterProcess]:
    assert plain
    file = folder / "cluster.toml"
    file.write_text(CONFIG.format(folder=folder))
    with running("--config", str(file)) as cluster:
        assert cluster.ready["failures"] == {}
        yield cluster


async def test_each_does_what_it_can_and_is_not_asked_for_more(
    cluster: ClusterProcess, plain: dict[str, torch.nn.Module]
) -> None:
    with torch.inference_mode():
        rows = plain["embedder"](torch.tensor([TOKENS])).last_hidden_state[0]
        expected = plain["decoder"].generate(
            torch.tensor([TOKENS]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    async with Client(cluster.address) as client:
        vectors, answer = await asyncio.gather(
            client.embed([TOKENS], model="embedder", pooling="mean", normalize=False),
            client.complete(TOKENS, model="decoder", max_tokens=6, temperature=0.0, ignore_eos=True, timeout=60),
        )
        assert (torch.tensor(vectors[0]) - rows.mean(0)).abs().max().item() < 1e-5
        assert list(answer.token_ids) == expected[0, len(TOKENS) :].tolist()
        for call in (client.embed([TOKENS], model="decoder"), client.complete(TOKENS, model="embedder")):
            with pytest.raises(FailedPreconditionError) as refused:
                await call
            assert refused.value.reason == Reason.ENGINE_CAPABILITY
