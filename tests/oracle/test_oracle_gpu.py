"""The GPU's kernels over the real model, interpreted: the same rule, on few tokens, as each row takes seconds."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from load_tests.rigs.gpu_teacher import WAYS, teacher_forced
from tests.oracle.answers import Committed, generate
from tests.oracle.conftest import ExpectedLogits
from tests.oracle.test_oracle_fp32 import assert_logits
from workers.build import read_manifest
from workers.config import EngineConfig
from workers.gpu import attention, drawing, projection
from workers.gpu.model import GpuModel
from workers.paged_on_gpu import assemble_on_device
from workers.types import ModelFiles
from workers.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.exact
NUM_TOKENS = {"at once": 36, "in chunks of 48": 60, "row by row": 7, "two rows at a time": 7}
"""Of a prompt and its answer, in each of the ways in which rows are computed."""


@pytest.fixture(scope="module")
def model(default_model: ModelFiles) -> GpuModel:
    return GpuModel(open_checkpoint(default_model.weights), torch.float32, "cpu")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are interpreted one after the other."""
    monkeypatch.setattr(attention, "NUM_PROGRAMS", 8)
    monkeypatch.setattr(drawing, "NUM_CANDIDATES", 8)
    monkeypatch.setattr(projection, "tiles_of", lambda *sizes: (1024, 1024, 1))


@pytest.mark.parametrize("way", WAYS)
def test_teacher_forced_logits(
    model: GpuModel, committed: list[Committed], expected_logits: ExpectedLogits, way: str
) -> None:
    name = "capital" if way == "in chunks of 48" else "short"
    (entry,) = (entry for entry in committed if entry.name == name)
    tokens = (entry.prompt + entry.answer)[: NUM_TOKENS[way]]
    assert_logits(teacher_forced(model, tokens, way), expected_logits(entry)[: len(tokens)], f"{name}, {way}")


def test_an_engine_s_answers(default_model: ModelFiles, model: GpuModel, committed: list[Committed]) -> None:
    """Prompts in chunks beside decodes, one step ahead of the device, and the end alone."""
    entries = [entry for entry in committed if len(entry.prompt) < 5]
    config = EngineConfig(chunk_tokens=4, max_num_sequences=2, num_blocks=16, max_model_len=64)
    manifest = read_manifest(default_model.manifest)
    engine = assemble_on_device(config, model, manifest, hash_key=b"oracle", memory=(1 << 30, 1 << 30))
    answers = generate(engine, [entry.prompt for entry in entries], 5)
    assert len(entries) == 2
    assert [answer.tokens for answer in answers] == [entry.answer[:5] for entry in entries]
    engine.check_integrity()
    engine.close()
