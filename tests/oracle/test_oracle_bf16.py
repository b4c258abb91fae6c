"""bf16: not exact, but never further from the fp32 reference than transformers' own bf16 is.

`make test` checks one prompt: without bf16 instructions transformers takes seconds for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.oracle.answers import Answer, Committed, generate
from tests.oracle.conftest import NewEngine
from tests.oracle.reference import gaps, reference_logits
from tests.oracle.teacher import teacher_forced
from workers.models.llama import LlamaModel

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


Judge = Callable[[tuple[int, ...]], Judgement]


@pytest.fixture(scope="module")
def judge(reference: Any, bf16_reference: Any) -> Judge:
    @functools.cache
    def judge(tokens: tuple[int, ...]) -> Judgement:
        expected = reference_logits(reference, list(tokens))
        error = reference_logits(bf16_reference, list(tokens)) - expected
        return Judgement(expected, rms(error), TAU * error.abs().max().item())

    return judge


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def assert_bf16_rule(model: LlamaModel, judge: Judge, prompt: list[int], answers: Iterable[Answer]) -> None:
    """Check what the engine answered to `prompt`, teacher-forced."""
    for tokens in {tuple(answer.tokens) for answer in answers}:
        everything = (*prompt, *tokens)
        judgement = judge(everything)
        for chunk_tokens in (256, 16):
            error = rms(teacher_forced(model, list(everything), chunk_tokens) - judgement.expected)
            assert error <= MAX_RMS_RATIO * judgement.rms, f"RMS error {error:.3f}, theirs {judgement.rms:.3f}"
        generated = judgement.expected[len(prompt) - 1 : -1]
        differs = generated.argmax(-1) != torch.tensor(tokens)
        assert (gaps(generated)[differs] <= judgement.tau).all()


def test_one_prompt(bf16_model: LlamaModel, judge: Judge, committed: list[Committed], new_engine: NewEngine) -> None:
    entry = next(entry for entry in committed if entry.name == "code")
    engine = new_engine(bf16_model, chunk_tokens=16, max_num_sequences=1)
    answers = generate(engine, [entry.prompt], 8)
    assert_bf16_rule(bf16_model, judge, entry.prompt, answers)


@pytest.mark.exact
@pytest.mark.parametrize("chunk_tokens", [16, 256])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_prompt(
    bf16_model: LlamaModel,
    judge: Judge,
    committed: list[Committed],
    new_engine: NewEngine,
    chunk_tokens: int,
    batch: int,
) -> None:
    engine = new_engine(bf16_model, chunk_tokens=chunk_tokens, max_num_sequences=batch)
    prompts = [entry.prompt for entry in committed]
    cold, warm = generate(engine, prompts, 16), generate(engine, prompts, 16)
    for prompt, *answers in zip(prompts, cold, warm, strict=True):
        assert_bf16_rule(bf16_model, judge, prompt, answers)
