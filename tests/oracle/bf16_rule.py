"""The rule for bf16: not exact, but never further from the fp32 reference than transformers' own bf16 is."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.oracle import loaded
from tests.oracle.reference import gaps, reference_logits
from tests.oracle.teacher import teacher_forced

MAX_RMS_RATIO = 1.1
TAU = 2.0
"""A token may differ where the fp32 gap is at most this multiple of transformers-bf16's largest error on the prompt."""


@dataclass(frozen=True)
class Judgement:
    """What the references say of some tokens."""

    expected: torch.Tensor
    """[tokens, vocab] logits in fp32."""
    rms: float
    """Of the error of transformers' own bf16."""
    tau: float


@functools.cache
def judge(weights: Path, tokens: tuple[int, ...]) -> Judgement:
    expected = reference_logits(loaded.reference(weights, torch.float32), list(tokens))
    error = reference_logits(loaded.reference(weights, torch.bfloat16), list(tokens)) - expected
    return Judgement(expected, rms(error), TAU * error.abs().max().item())


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def assert_bf16_rule(weights: Path, prompt: list[int], answers: Iterable[tuple[int, ...]]) -> None:
    """Check what was answered to `prompt` by our bf16 model of `weights`, teacher-forced."""
    model = loaded.model(weights, torch.bfloat16)
    for tokens in set(answers):
        everything = (*prompt, *tokens)
        judgement = judge(weights, everything)
        for chunk_tokens in (256, 16):
            error = rms(teacher_forced(model, list(everything), chunk_tokens) - judgement.expected)
            assert error <= MAX_RMS_RATIO * judgement.rms, f"RMS error {error:.3f}, theirs {judgement.rms:.3f}"
        generated = judgement.expected[len(prompt) - 1 : -1]
        differs = generated.argmax(-1) != torch.tensor(tokens)
        assert (gaps(generated)[differs] <= judgement.tau).all()
