"""fp32: whatever the engine does with a request, its greedy answer is the reference's, token for token.

`make test` runs a pairwise covering set of conditions on the shorter prompts, `make exact` the same on all of them with
longer answers. The full product of conditions is for the small models of `test_random_models`.
"""

from __future__ import annotations

import functools

import pytest
import torch

from load_tests.rigs.reference import GAP, gaps
from load_tests.rigs.teacher import teacher_forced
from tests.oracle.answers import Committed, generate
from tests.oracle.cases import num_prompts, run_case, seeded_choices
from tests.oracle.conftest import ExpectedLogits, NewEngine
from tests.oracle.covering import covering
from tests.oracle.regenerate import NUM_TOKENS, compute, differences
from workers.attention.reference import ReferenceAttention
from workers.forward import LoadedModel
from workers.kv_memory import KvMemory
from workers.models.llama import LlamaModel
from workers.models.torch_forward import TorchForward
from workers.types import SamplingParams

MAX_LOGIT_ERROR = 1e-3
BLOCK_SIZE = 16
CASES = covering()
NUM_SHORT_TOKENS = 5


def shorter(committed: list[Committed], limit: int = 115) -> list[Committed]:
    return [entry for entry in committed if len(entry.prompt) < limit]


def test_enough_prompts_and_few_cases(committed: list[Committed]) -> None:
    assert len(shorter(committed)) >= 16
    assert max(len(entry.prompt) for entry in committed) > 1500
    assert len(CASES) <= 16


def test_committed_answers_are_the_references(committed: list[Committed], expected_logits: ExpectedLogits) -> None:
    assert_committed(shorter(committed), expected_logits)


def assert_committed(entries: list[Committed], expected_logits: ExpectedLogits) -> None:
    """At every generated position the reference prefers the committed token by 2e-3 at least."""
    for entry in entries:
        assert len(entry.answer) == NUM_TOKENS
        logits = expected_logits(entry)[len(entry.prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == entry.answer, entry.name
        assert gaps(logits).min() >= GAP, entry.name


def assert_logits(logits: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """An error of 1e-3 at most, and the same argmax where it is clear."""
    error = (logits - expected).abs().max().item()
    assert error <= MAX_LOGIT_ERROR, f"{name}: a logit is off by {error:.1e}"
    is_clear = gaps(expected) >= GAP
    assert torch.equal(logits.argmax(-1)[is_clear], expected.argmax(-1)[is_clear]), name


def test_teacher_forced_logits(
    fp32_model: LoadedModel, committed: list[Committed], expected_logits: ExpectedLogits
) -> None:
    """Whole; and every fourth prompt in chunks of 16."""
    for number, entry in enumerate(shorter(committed)):
        tokens = entry.prompt + entry.answer
        for chunk_tokens in (256, 16) if number % 4 == 3 else (256,):
            assert_logits(teacher_forced(fp32_model, tokens, chunk_tokens), expected_logits(entry), entry.name)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_conditions(fp32_model: LoadedModel, committed: list[Committed], new_engine: NewEngine, number: int) -> None:
    assert_condition(functools.partial(new_engine, fp32_model), committed, number)


@pytest.mark.parametrize("number", range(0, len(CASES), 3))
def test_conditions_with_torch(
    torch_model: LlamaModel, committed: list[Committed], new_engine: NewEngine, number: int
) -> None:
    assert_condition(functools.partial(new_engine, torch_model), committed, number)


def assert_condition(make: NewEngine, committed: list[Committed], number: int) -> None:
    case, entries = CASES[number], shorter(committed)
    first = sum(num_prompts(each) for each in CASES[:number])
    chosen = [entries[(first + i) % len(entries)] for i in range(num_prompts(case))]
    run_case(case, chosen, NUM_SHORT_TOKENS, make, block_size=BLOCK_SIZE, seed=number)


def test_preemption(fp32_model: LoadedModel, committed: list[Committed], new_engine: NewEngine) -> None:
    """Sequences lose their blocks, are recomputed, and say the same."""
    few = [entry for entry in committed if len(entry.prompt) in range(33, 46)][:4]
    engine = new_engine(fp32_model, chunk_tokens=64, max_num_sequences=4, num_blocks=10, max_model_len=160)
    answers = generate(engine, [entry.prompt for entry in few], 20)
    assert [answer.tokens for answer in answers] == [entry.answer[:20] for entry in few]
    assert sum(answer.num_preemptions for answer in answers) > 0


def test_a_quotation_is_looked_up(fp32_model: LoadedModel, committed: list[Committed], new_engine: NewEngine) -> None:
    """Most of what is quoted is guessed, and comes several tokens a step."""
    (entry,) = (entry for entry in committed if entry.name == "report-quote")
    engine = new_engine(fp32_model, chunk_tokens=256, max_num_sequences=1, lookup_tokens=8)
    (answer,) = generate(engine, [entry.prompt], NUM_TOKENS)
    assert answer.tokens == entry.answer
    assert engine.load().num_accepted_tokens > NUM_TOKENS // 2


@pytest.mark.exact
def test_all_committed_answers_are_the_references(committed: list[Committed], expected_logits: ExpectedLogits) -> None:
    assert_committed(committed, expected_logits)


@pytest.mark.exact
@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_conditions_on_all_prompts(
    fp32_model: LoadedModel, committed: list[Committed], new_engine: NewEngine, number: int
) -> None:
    """Alone, each case has every fourth prompt; 5 at once all but the longest; 16 at once all of them."""
    case = CASES[number]
    alone = [each for each in CASES if each.batch == 1]
    chosen = {
        1: committed[alone.index(case) :: len(alone)] if case in alone else [],
        5: shorter(committed, 1000),
        16: committed,
    }[case.batch]
    make = functools.partial(new_engine, fp32_model)
    run_case(case, chosen, NUM_TOKENS, make, block_size=BLOCK_SIZE, seed=number)


@pytest.mark.exact
def test_seeded_choices_are_those_of_single_works(
    fp32_model: LoadedModel, committed: list[Committed], new_engine: NewEngine
) -> None:
    make = functools.partial(new_engine, fp32_model)
    for entry in shorter(committed)[::4]:
        seeded_choices(make, entry.prompt, 24, SamplingParams(seed=11, temperature=0.8, top_p=0.95))


@pytest.mark.exact
def test_teacher_forced_in_chunks_of_16(
    fp32_model: LoadedModel, committed: list[Committed], expected_logits: ExpectedLogits
) -> None:
    for entry in committed:
        assert_logits(teacher_forced(fp32_model, entry.prompt + entry.answer, 16), expected_logits(entry), entry.name)


@pytest.mark.exact
def test_teacher_forced_token_by_token(
    fp32_model: LoadedModel, committed: list[Committed], expected_logits: ExpectedLogits
) -> None:
    for entry in shorter(committed)[::2]:
        assert_logits(teacher_forced(fp32_model, entry.prompt + entry.answer, 1), expected_logits(entry), entry.name)


@pytest.mark.exact
def test_teacher_forced_with_reference_attention(
    torch_model: LlamaModel, committed: list[Committed], expected_logits: ExpectedLogits
) -> None:
    def over(cache: KvMemory) -> TorchForward:
        return torch_model.over(cache, ReferenceAttention())

    for entry in shorter(committed, 500):
        logits = teacher_forced(torch_model, entry.prompt + entry.answer, 64, over)
        assert_logits(logits, expected_logits(entry), entry.name)


@pytest.mark.exact
def test_committed_answers_are_regenerated(committed: list[Committed]) -> None:
    assert not differences(compute(), [vars(entry) for entry in committed])
