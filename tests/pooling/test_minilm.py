"""all-MiniLM-L6-v2, which comes in a package: against vectors that sentence-transformers 6.2.0 made of the same files,
and against transformers computing alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from cluster.models import fetch_model
from router.model import ServedModel
from workers.build import build_engine
from workers.config import EngineConfig
from workers.errors import ModelFileError
from workers.types import ModelFiles, PoolWork, WorkId

REFERENCE = json.loads((Path(__file__).parent / "minilm.json").read_text())


@pytest.fixture(scope="module")
def minilm() -> ModelFiles:
    try:
        return fetch_model("minilm")
    except ModelFileError as error:
        pytest.skip(f"all-MiniLM-L6-v2 cannot be fetched: {error}")


def embed(files: ModelFiles, **how: Any) -> torch.Tensor:
    engine = build_engine(EngineConfig(engine="transformers"), files, hash_key=b"", threads=1)
    tokenizer = ServedModel.from_files(files).tokenizer
    texts = REFERENCE["texts"]
    for number, text in enumerate(texts):
        tokens = tokenizer.encode_at_most(text, engine.info.max_model_len)
        engine.submit(PoolWork(work_id=WorkId("test", number), tokens=tokens, **how))
    while engine.step():
        pass
    found = {delta.work_id.number: delta.pooled for delta in engine.drain_outputs()}
    return torch.tensor([found[number] for number in range(len(texts))])


def test_equals_sentence_transformers(minilm: ModelFiles) -> None:
    """Of which the last text is longer than the model takes, and loses its end."""
    assert (embed(minilm) - torch.tensor(REFERENCE["vectors"])).abs().max().item() < 1e-5


@pytest.mark.parametrize("method", ["cls", "mean", "max", "last"])
def test_equals_transformers(method: str, minilm: ModelFiles) -> None:
    model = transformers.AutoModel.from_pretrained(minilm.weights).eval()
    tokenizer = ServedModel.from_files(minilm).tokenizer
    expected = []
    with torch.inference_mode():
        for text in REFERENCE["texts"]:
            rows = model(torch.tensor([tokenizer.encode_at_most(text, 256)])).last_hidden_state[0]
            pooled = {"cls": rows[0], "mean": rows.mean(0), "max": rows.max(0).values, "last": rows[-1]}
            expected.append(pooled[method])
    found = embed(minilm, method=method, normalize=False)
    assert (found - torch.stack(expected)).abs().max().item() < 1e-5
