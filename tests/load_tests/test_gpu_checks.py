"""What holds a GPU's engine to references finds no fault with a small model, interpreted, and much with another one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from load_tests.rigs import gpu_checks
from load_tests.rigs.gpu_checks import Checks
from load_tests.rigs.gpu_engine import RandomCheckpoint
from load_tests.rigs.gpu_teacher import reference_logits, reference_model
from workers.gpu import attention, drawing
from workers.weights.shape import from_config

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
}
PROMPTS = ((5, 6, 7, 8, 9, 10), (5, 6, 7, 8, 20, 21))


@pytest.fixture(scope="module")
def checkpoint() -> RandomCheckpoint:
    return RandomCheckpoint(from_config(gpu_checks.RANDOM["llama"] | SMALL), std=0.3)


@pytest.fixture(scope="module")
def answers(checkpoint: RandomCheckpoint) -> dict[tuple[int, ...], list[int]]:
    reference, found = reference_model(checkpoint, torch.float32), {}
    for prompt in PROMPTS:
        tokens = list(prompt)
        for _ in range(4):
            tokens.append(int(reference_logits(reference, tokens)[-1].argmax()))
        found[prompt] = tokens[len(prompt) :]
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "NUM_PROGRAMS", 8)
    monkeypatch.setattr(drawing, "NUM_CANDIDATES", 8)
    few = {"block_size": 4, "num_blocks": 16, "max_model_len": 16, "max_num_sequences": 2, "chunk_tokens": 8}
    monkeypatch.setattr(gpu_checks, "SETTINGS", {"at once": few, "preempted": few | {"num_blocks": 4}})


def test_right_answers(checkpoint: RandomCheckpoint, answers: dict[tuple[int, ...], list[int]]) -> None:
    checks = Checks()
    checks.answers("small", checkpoint, answers, (torch.float32, "preempted"), tau=0.0)
    assert [bar.ok for bar in checks.bars] == [True] * 3, checks.bars


def test_an_engine_that_says_something_else(
    checkpoint: RandomCheckpoint, answers: dict[tuple[int, ...], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights than the reference's."""
    other = RandomCheckpoint(checkpoint.shape, std=0.3, seed=1)
    model = gpu_checks.GpuModel
    monkeypatch.setattr(gpu_checks, "GpuModel", lambda checkpoint, *rest: model(other, *rest))
    checks = Checks()
    checks.answers("small", checkpoint, answers, (torch.float32, "at once"), tau=0.0)
    assert not any(bar.ok for bar in checks.bars if "preferred" in bar.bar or "oracle" in bar.bar)


def test_logits(checkpoint: RandomCheckpoint, answers: dict[tuple[int, ...], list[int]]) -> None:
    checks = Checks()
    assert checks.logits("small", checkpoint, PROMPTS[0][:2]) > 0
    assert all(bar.ok for bar in checks.bars if "fp32" in bar.bar), checks.bars
