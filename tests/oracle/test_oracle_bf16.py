"""bf16: not exact, but never further from the fp32 reference than transformers' own bf16 is.

`make test` checks one prompt: without bf16 instructions transformers takes seconds for each.
"""

from __future__ import annotations

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


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def assert_bf16_rule(
    model: LlamaModel,
    reference: Any,
    bf16_reference: Any,
    prompt: list[int],
    answers: list[Answer],
) -> None:
    """Check what the engine answered to `prompt`, teacher-forced; all `answers` of the same length."""
    for tokens in {tuple(answer.tokens) for answer in answers}:
        everything = prompt + list(tokens)
        expected = reference_logits(reference, everything)
        theirs = reference_logits(bf16_reference, everything) - expected
        for chunk_tokens in (256, 16):
            ours = teacher_forced(model, everything, chunk_tokens) - expected
            assert rms(ours) <= MAX_RMS_RATIO * rms(theirs), f"RMS error {rms(ours):.3f}, theirs {rms(theirs):.3f}"
        tau = TAU * theirs.abs().max()
        generated = expected[len(prompt) - 1 : -1]
        differs = generated.argmax(-1) != torch.tensor(tokens)
        assert (gaps(generated)[differs] <= tau).all()


def test_one_prompt(
    bf16_model: LlamaModel, reference: Any, bf16_reference: Any, committed: list[Committed], new_engine: NewEngine
) -> None:
    entry = next(entry for entry in committed if entry.name == "code")
    engine = new_engine(bf16_model, chunk_tokens=16, max_num_sequences=1)
    answers = generate(engine, [entry.prompt], 8)
    assert_bf16_rule(bf16_model, reference, bf16_reference, entry.prompt, answers)


@pytest.mark.exact
@pytest.mark.parametrize("chunk_tokens", [16, 256])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_prompt(
    bf16_model: LlamaModel,
    reference: Any,
    bf16_reference: Any,
    committed: list[Committed],
    new_engine: NewEngine,
    chunk_tokens: int,
    batch: int,
) -> None:
    engine = new_engine(bf16_model, chunk_tokens=chunk_tokens, max_num_sequences=batch)
    prompts = [entry.prompt for entry in committed]
    cold, warm = generate(engine, prompts, 16), generate(engine, prompts, 16)
    for prompt, *answers in zip(prompts, cold, warm, strict=True):
        assert_bf16_rule(bf16_model, reference, bf16_reference, prompt, answers)
