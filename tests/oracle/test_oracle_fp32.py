"""fp32: whatever the engine does with a request, its greedy answer is the reference's, token for token.

`make test` runs what fits its time; `make exact` the full product.
"""

from __future__ import annotations

import pytest
import torch

from tests.oracle.answers import Answer, Committed, generate
from tests.oracle.conftest import NewEngine
from tests.oracle.reference import GAP, gaps
from tests.oracle.regenerate import NUM_TOKENS, compute, differences
from tests.oracle.teacher import teacher_forced
from workers.attention.reference import ReferenceAttention
from workers.models.llama import LlamaModel

MAX_LOGIT_ERROR = 1e-3


def assert_answers(answers: list[Answer], committed: list[Committed], first: int = 0) -> None:
    wrong = [
        entry.name
        for answer, entry in zip(answers, committed, strict=True)
        if answer.tokens != entry.answer[first : first + len(answer.tokens)] or not answer.tokens
    ]
    assert not wrong, f"answers differ from the reference: {wrong}"


def shorter(committed: list[Committed]) -> list[Committed]:
    return [entry for entry in committed if len(entry.prompt) < 100]


def test_committed_answers_are_the_references(
    committed: list[Committed], expected_logits: dict[str, torch.Tensor]
) -> None:
    """At every generated position the reference prefers the committed token by 2e-3 at least."""
    assert len(committed) >= 8
    assert max(len(entry.prompt) for entry in committed) > 300
    for entry in committed:
        assert len(entry.answer) == NUM_TOKENS
        logits = expected_logits[entry.name][len(entry.prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == entry.answer, entry.name
        assert gaps(logits).min() >= GAP, entry.name


@pytest.mark.parametrize("chunk_tokens", [16, 256])
def test_teacher_forced_logits(
    fp32_model: LlamaModel, committed: list[Committed], expected_logits: dict[str, torch.Tensor], chunk_tokens: int
) -> None:
    """At every position of prompt and answer: an error of 1e-3 at most, and the same argmax where it is clear.

    In chunks of 16 the long prompt is for `make exact`.
    """
    for entry in committed if chunk_tokens == 256 else shorter(committed):
        expected = expected_logits[entry.name]
        assert_logits(teacher_forced(fp32_model, entry.prompt + entry.answer, chunk_tokens), expected, entry.name)


def assert_logits(logits: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    error = (logits - expected).abs().max().item()
    assert error <= MAX_LOGIT_ERROR, f"{name}: a logit is off by {error:.1e}"
    is_clear = gaps(expected) >= GAP
    assert torch.equal(logits.argmax(-1)[is_clear], expected.argmax(-1)[is_clear]), name


@pytest.mark.parametrize("chunk_tokens", [16, 256])
def test_batch_of_8_cold_and_warm(
    fp32_model: LlamaModel, committed: list[Committed], new_engine: NewEngine, chunk_tokens: int
) -> None:
    engine = new_engine(fp32_model, chunk_tokens=chunk_tokens, max_num_sequences=8)
    entries, num_tokens = (committed, 20) if chunk_tokens == 256 else (shorter(committed), 12)
    prompts = [entry.prompt for entry in entries]
    cold = generate(engine, prompts, num_tokens)
    assert_answers(cold, entries)
    warm = generate(engine, prompts, num_tokens)
    assert_answers(warm, entries)
    for answer, entry in zip(warm, entries, strict=True):
        # All full blocks of the prompt; but a prompt's last token is always computed.
        assert answer.num_cached_tokens == min(len(entry.prompt) // 16 * 16, len(entry.prompt) - 1)


def test_alone_cold_and_warm(fp32_model: LlamaModel, committed: list[Committed], new_engine: NewEngine) -> None:
    few = [entry for entry in committed if entry.name in ("one-token", "korean")]
    engine = new_engine(fp32_model, chunk_tokens=16, max_num_sequences=1)
    for _ in range(2):
        assert_answers(generate(engine, [entry.prompt for entry in few], 8), few)


def test_preempted(fp32_model: LlamaModel, committed: list[Committed], new_engine: NewEngine) -> None:
    """In a pool too small for all, sequences lose their blocks, are recomputed, and say the same."""
    few = [entry for entry in committed if len(entry.prompt) in range(30, 50)][:4]
    engine = new_engine(fp32_model, chunk_tokens=64, max_num_sequences=4, num_blocks=10)
    answers = generate(engine, [entry.prompt for entry in few], 24)
    assert_answers(answers, few)
    assert sum(answer.num_preemptions for answer in answers) > 0


def test_resumed(fp32_model: LlamaModel, committed: list[Committed], new_engine: NewEngine) -> None:
    """An answer goes on after what was received of it as if it had never been interrupted."""
    few = [entry for entry in committed if entry.name in ("code", "chinese", "short")]
    engine = new_engine(fp32_model, chunk_tokens=64, max_num_sequences=4)
    received = [entry.answer[:11] for entry in few]
    answers = generate(engine, [entry.prompt for entry in few], 20, received=received)
    assert_answers(answers, few, first=11)
    assert [len(answer.tokens) for answer in answers] == [9, 9, 9]


@pytest.mark.exact
@pytest.mark.parametrize("chunk_tokens", [16, 256])
@pytest.mark.parametrize("batch", [1, 8])
def test_every_prompt_cold_and_warm(
    fp32_model: LlamaModel, committed: list[Committed], new_engine: NewEngine, chunk_tokens: int, batch: int
) -> None:
    engine = new_engine(fp32_model, chunk_tokens=chunk_tokens, max_num_sequences=batch)
    for _ in range(2):
        assert_answers(generate(engine, [entry.prompt for entry in committed], NUM_TOKENS), committed)


@pytest.mark.exact
def test_teacher_forced_in_chunks_of_16(
    fp32_model: LlamaModel, committed: list[Committed], expected_logits: dict[str, torch.Tensor]
) -> None:
    for entry in committed:
        logits = teacher_forced(fp32_model, entry.prompt + entry.answer, 16)
        assert_logits(logits, expected_logits[entry.name], entry.name)


@pytest.mark.exact
def test_teacher_forced_token_by_token(
    fp32_model: LlamaModel, committed: list[Committed], expected_logits: dict[str, torch.Tensor]
) -> None:
    for entry in shorter(committed):
        logits = teacher_forced(fp32_model, entry.prompt + entry.answer, 1)
        assert_logits(logits, expected_logits[entry.name], entry.name)


@pytest.mark.exact
def test_teacher_forced_with_reference_attention(
    fp32_model: LlamaModel, committed: list[Committed], expected_logits: dict[str, torch.Tensor]
) -> None:
    for entry in committed:
        logits = teacher_forced(fp32_model, entry.prompt + entry.answer, 64, ReferenceAttention())
        assert_logits(logits, expected_logits[entry.name], entry.name)


@pytest.mark.exact
def test_committed_answers_are_regenerated(committed: list[Committed]) -> None:
    assert not differences(compute(), [vars(entry) for entry in committed])
