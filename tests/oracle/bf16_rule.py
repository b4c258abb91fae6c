"""The rule for bf16: not exact, but never further from the fp32 reference than transformers' own bf16 is.

What transformers' bf16 is off by is measured once for each prompt, in one pass over it and its committed answer, which
takes seconds without bf16 instructions. Whatever is answered is then judged by the fp32 reference.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from load_tests.rigs.reference import gaps, reference_logits
from load_tests.rigs.teacher import teacher_forced
from tests.oracle import loaded
from tests.oracle.answers import committed_answers
from workers.forward import LoadedModel

MAX_RMS_RATIO = 1.1
TAU = 2.0
"""A token may differ where the fp32 gap is at most this multiple of transformers-bf16's largest error on the prompt."""


@dataclass(frozen=True)
class Judgement:
    """What the references say of a prompt, over its tokens and those of the committed answer."""

    tokens: tuple[int, ...]
    expected: torch.Tensor
    """[tokens, vocab] logits in fp32."""
    rms: float
    """Of the error of transformers' own bf16."""
    tau: float


@functools.cache
def judge(weights: Path, prompt: tuple[int, ...]) -> Judgement:
    tokens = (*prompt, *committed_answer(prompt))
    expected = loaded.expected(weights, tokens)
    error = reference_logits(loaded.reference(weights, torch.bfloat16), list(tokens)) - expected
    return Judgement(tokens, expected, rms(error), TAU * error.abs().max().item())


@functools.cache
def committed_answer(prompt: tuple[int, ...]) -> tuple[int, ...]:
    return next(tuple(entry.answer) for entry in committed_answers() if entry.prompt == list(prompt))


def rms(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def assert_bf16_rule(model: LoadedModel, weights: Path, prompt: list[int], answers: Iterable[tuple[int, ...]]) -> None:
    """Check a bf16 model of `weights` on a prompt of the oracle, and what it answered to it."""
    check_logits(model, weights, tuple(prompt))
    for answer in set(answers):
        check_answer(weights, tuple(prompt), answer)


@functools.cache
def check_logits(model: LoadedModel, weights: Path, prompt: tuple[int, ...]) -> None:
    """Teacher-forced, in chunks of either size, the RMS error is at most 1.1 times that of transformers' bf16."""
    judgement = judge(weights, prompt)
    for chunk_tokens in (256, 16):
        error = rms(teacher_forced(model, list(judgement.tokens), chunk_tokens) - judgement.expected)
        assert error <= MAX_RMS_RATIO * judgement.rms, f"RMS error {error:.3f}, theirs {judgement.rms:.3f}"


@functools.cache
def check_answer(weights: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
    """Where a token is not the fp32 reference's choice after the same tokens, that choice was hardly preferred."""
    if answer == committed_answer(prompt)[: len(answer)]:
        return  # the reference's own
    expected = reference_logits(loaded.reference(weights, torch.float32), [*prompt, *answer])[len(prompt) - 1 : -1]
    differs = expected.argmax(-1) != torch.tensor(answer)
    assert (gaps(expected)[differs] <= judge(weights, prompt).tau).all()
