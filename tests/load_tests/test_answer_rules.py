"""The oracle's verdicts, on a small random model that plays the reference."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from load_tests.rigs.answer_rules import Rounding, judge, rounded_activations, to_bf16, to_int8
from load_tests.rigs.perplexity import perplexity
from load_tests.rigs.reference import reference_logits

PROMPT = [5, 9, 2, 7]
LENGTH = 6


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def answer(model: LlamaForCausalLM) -> list[int]:
    """The reference's own."""
    tokens = list(PROMPT)
    for _ in range(LENGTH):
        tokens.append(int(reference_logits(model, tokens)[-1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("arithmetic", ["exact", "bf16", "int8"])
def test_the_references_own_answer_is_right(model: LlamaForCausalLM, answer: list[int], arithmetic: str) -> None:
    verdict = judge(model, PROMPT, answer, arithmetic)
    assert (verdict.num_tokens, verdict.num_different, verdict.num_wrong) == (LENGTH, 0, 0)


@pytest.mark.parametrize("arithmetic", ["exact", "bf16", "int8"])
def test_the_least_likely_token_is_wrong(model: LlamaForCausalLM, answer: list[int], arithmetic: str) -> None:
    worst = int(reference_logits(model, [*PROMPT, *answer[:-1]])[-1].argmin())
    verdict = judge(model, PROMPT, [*answer[:-1], worst], arithmetic)
    assert (verdict.num_different, verdict.num_wrong) == (1, 1)
    assert verdict.largest_gap > verdict.limit


@pytest.mark.parametrize(("arithmetic", "rounding"), [("int8", to_int8), ("bf16", to_bf16)])
def test_what_rounding_explains_is_excused(
    model: LlamaForCausalLM, answer: list[int], arithmetic: str, rounding: Rounding
) -> None:
    """The limit is twice the largest error of the rounded reference itself."""
    second = int(reference_logits(model, PROMPT)[-1].topk(2).indices[1])
    prompt, other = PROMPT, [second]
    expected = reference_logits(model, [*prompt, *other])[len(prompt) - 1 : -1]
    with rounded_activations(model, rounding):
        error = reference_logits(model, [*prompt, *other])[len(prompt) - 1 : -1] - expected
    verdict = judge(model, prompt, other, arithmetic)
    assert verdict.limit == pytest.approx(2 * error.abs().max().item())
    assert verdict.num_wrong == int(verdict.largest_gap >= verdict.limit)
    assert judge(model, prompt, other, "exact").limit < verdict.limit


def test_rounding_ends_with_its_scope(model: LlamaForCausalLM) -> None:
    before = reference_logits(model, PROMPT)
    with rounded_activations(model, to_int8):
        assert not torch.equal(reference_logits(model, PROMPT), before)
    assert torch.equal(reference_logits(model, PROMPT), before)


def test_rounding_is_by_groups_of_32() -> None:
    x = torch.zeros(2, 64)
    x[0, 0], x[0, 1], x[0, 32] = 127.0, 0.4, 0.4
    assert torch.equal(to_int8(x)[0, [0, 1]], torch.tensor([127.0, 0.0]))
    assert to_int8(x)[0, 32].item() == pytest.approx(0.4)
    assert torch.equal(to_int8(x)[1], torch.zeros(64))


def test_perplexity_of_knowing_nothing_is_the_vocabulary() -> None:
    windows = [[1, 2, 3, 4], [4, 3, 2, 1]]
    assert perplexity(windows, lambda tokens: torch.zeros(len(tokens), 64)) == pytest.approx(64.0)


def test_perplexity_is_over_all_tokens_but_the_first() -> None:
    def half_sure(tokens: list[int]) -> torch.Tensor:
        logits = torch.full((len(tokens), 8), -math.inf)
        for position, following in enumerate(tokens[1:]):
            logits[position, [following, 7]] = 0.0
        return logits

    assert perplexity([[1, 2, 3], [1, 2]], half_sure) == pytest.approx(2.0)
