"""Activations rounded to int8: no further from the fp32 reference than the same rounding in the reference itself."""

from __future__ import annotations

import pytest
import torch

from load_tests.rigs.answer_rules import judge, rounded_activations, to_int8
from load_tests.rigs.reference import reference_logits
from load_tests.rigs.teacher import teacher_forced
from tests.oracle import loaded
from tests.oracle.answers import Committed, generate
from tests.oracle.bf16_rule import rms
from tests.oracle.conftest import ExpectedLogits, NewEngine
from workers.forward import LoadedModel
from workers.types import ModelFiles

MAX_RMS_RATIO = 1.1
NUM_TOKENS = 16


def test_logits(
    default_model: ModelFiles, int8_model: LoadedModel, committed: list[Committed], expected_logits: ExpectedLogits
) -> None:
    entries = [entry for entry in committed if len(entry.prompt) < 40][::2]
    assert_logits(default_model, int8_model, entries, expected_logits)


def test_answers(
    default_model: ModelFiles, int8_model: LoadedModel, committed: list[Committed], new_engine: NewEngine
) -> None:
    assert_answers(default_model, int8_model, [entry for entry in committed if len(entry.prompt) < 115], new_engine)


@pytest.mark.exact
def test_logits_of_every_prompt(
    default_model: ModelFiles, int8_model: LoadedModel, committed: list[Committed], expected_logits: ExpectedLogits
) -> None:
    assert_logits(default_model, int8_model, committed, expected_logits)


@pytest.mark.exact
def test_answers_to_every_prompt(
    default_model: ModelFiles, int8_model: LoadedModel, committed: list[Committed], new_engine: NewEngine
) -> None:
    assert_answers(default_model, int8_model, committed, new_engine)


def assert_logits(
    files: ModelFiles, model: LoadedModel, entries: list[Committed], expected_logits: ExpectedLogits
) -> None:
    """Teacher-forced, in chunks of many rows, of few and of one. Over all prompts together: one number that rounds the
    other way moves the error of a short prompt by a quarter."""
    reference = loaded.reference(files.weights, torch.float32)
    theirs, ours = [], []
    for number, entry in enumerate(entries):
        tokens, expected = [*entry.prompt, *entry.answer], expected_logits(entry)
        with rounded_activations(reference, to_int8):
            theirs.append(reference_logits(reference, tokens) - expected)
        ours.append(teacher_forced(model, tokens, (256, 5, 1)[number % 3]) - expected)
    error, limit = rms(torch.cat(ours)), MAX_RMS_RATIO * rms(torch.cat(theirs))
    assert error <= limit, f"RMS error {error:.3f}, limit {limit:.3f}"


def assert_answers(files: ModelFiles, model: LoadedModel, entries: list[Committed], new_engine: NewEngine) -> None:
    """All at once, cold and warm; different from the committed answers only where the rule excuses it."""
    engine = new_engine(model, chunk_tokens=64, max_num_sequences=8, num_blocks=1024)
    prompts = [entry.prompt for entry in entries]
    cold, warm = generate(engine, prompts, NUM_TOKENS), generate(engine, prompts, NUM_TOKENS)
    assert sum(answer.num_cached_tokens for answer in cold) < sum(answer.num_cached_tokens for answer in warm)
    reference = loaded.reference(files.weights, torch.float32)
    for entry, *answers in zip(entries, cold, warm, strict=True):
        for answer in {tuple(answer.tokens) for answer in answers} - {tuple(entry.answer[:NUM_TOKENS])}:
            verdict = judge(reference, entry.prompt, answer, "int8")
            assert not verdict.num_wrong, f"{entry.name}: {verdict}"
