"""The sampler's rules, on vocabularies small enough to see, and its independence of batch, order and history."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from workers import sampler
from workers.sampler import Floats, Place, uniforms
from workers.sequence import Sequence as EngineSequence
from workers.types import GenerateWork, SamplingParams, WorkId

NEG = -math.inf


def sequence(
    prompt: Sequence[int] = (0,),
    answer: Sequence[int] = (),
    allowed: Sequence[int] | None = None,
    work: Mapping[str, Any] = MappingProxyType({}),
    **params: Any,
) -> EngineSequence:
    generate = GenerateWork(
        work_id=WorkId("test", 0),
        prompt=list(prompt),
        received=[list(answer)],
        sampling=SamplingParams(**params),
        max_tokens=100,
        **work,
    )
    return EngineSequence(generate, constraint=None if allowed is None else Allowed(allowed))


def floats(rows: Sequence[Sequence[float]]) -> Floats:
    return np.array(rows, dtype=np.float32)


def random_logits(*size: int) -> Floats:
    return np.random.default_rng(0).standard_normal(size, dtype=np.float32)


def draw(logits: Floats, sequences: Sequence[EngineSequence], positions: Sequence[int]) -> list[int]:
    places = [Place(each, position) for each, position in zip(sequences, positions, strict=True)]
    return sampler.draw(logits, places).tokens


class Allowed:
    """A constraint that never changes."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def mask(self) -> Sequence[int]:
        return self._tokens

    def advance(self, token_id: int) -> None:
        assert token_id in self._tokens


def draw_many(row: list[float], count: int = 4000, **params: Any) -> Counter[int]:
    """Draw at `count` positions of one sequence."""
    sequences = [sequence(**params)] * count
    return Counter(draw(floats([row] * count), sequences, range(count)))


def test_greedy_takes_the_largest() -> None:
    logits = floats([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert draw(logits, [sequence(temperature=0.0, top_k=1)] * 2, [1, 1]) == [1, 0]


def test_frequencies_are_the_probabilities() -> None:
    probabilities = [0.5, 0.3, 0.15, 0.05]
    counts = draw_many([math.log(p) for p in probabilities], temperature=1.0)
    for token, probability in enumerate(probabilities):
        assert counts[token] / 4000 == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 4000))


def test_temperature_sharpens() -> None:
    row = [math.log(p) for p in (0.5, 0.3, 0.2)]
    counts = draw_many(row, temperature=0.5)
    assert counts[0] / 4000 == pytest.approx(0.25 / 0.38, abs=0.04)
    assert draw_many(row, temperature=1e-30) == {0: 4000}
    assert set(draw_many(row, temperature=1e30)) == {0, 1, 2}


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 2}, {1, 2}),
        ({"top_k": 3}, {0, 1, 2, 3}),  # 0 and 3 are equal: both are third
        ({"top_k": 100}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.39}, {2}),
        ({"top_p": 0.41}, {1, 2}),
        ({"top_p": 0.71}, {0, 1, 2, 3}),
        ({"top_p": 1e-9}, {2}),
        ({"min_p": 0.7}, {1, 2}),
        ({"min_p": 1.0}, {2}),
        ({"min_p": 0.3}, {0, 1, 2, 3}),
        ({"top_k": 2, "top_p": 0.5}, {2}),  # of the two that top_k keeps, 2 has 4 / 7
    ],
)
def test_what_is_kept(params: dict[str, Any], kept: set[int]) -> None:
    row = [math.log(p) for p in (0.13, 0.3, 0.4, 0.13, 0.04)]
    assert set(draw_many(row, count=600, **params)) == kept


def test_top_p_of_a_flat_distribution_needs_more_than_the_candidates() -> None:
    counts = draw_many([0.0] * 599 + [1e-3], count=3000, top_p=0.9)
    assert len(counts) > 300


def test_rows_keep_their_own_parameters() -> None:
    """A mixed batch says what each row says alone, in any order."""
    logits = random_logits(7, 300) * 3
    sequences = [
        sequence(temperature=0.0),
        sequence(seed=1),
        sequence(seed=2, temperature=0.7, top_k=5),
        sequence(seed=3, top_p=0.6),
        sequence(seed=4, min_p=0.1, temperature=1.5),
        sequence((1, 2), (3, 3), seed=5, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2),
        sequence((1, 2), (3, 3), temperature=0.0, repetition_penalty=5.0),
    ]
    positions = [5, 6, 7, 8, 9, 10, 11]
    together = draw(logits.copy(), sequences, positions)
    alone = [draw(logits[i : i + 1].copy(), [sequences[i]], [positions[i]])[0] for i in range(7)]
    backwards = draw(logits[::-1].copy(), sequences[::-1], positions[::-1])[::-1]
    assert together == alone == backwards


def test_uniforms_depend_on_seed_and_position_alone() -> None:
    assert uniforms([1, 2, 2**64 - 1, -1], [7, 7, 7, 7]).tolist()[2:] == [uniforms([-1], [7])[0]] * 2
    grid = uniforms([seed for seed in range(100) for _ in range(100)], list(range(100)) * 100)
    assert len(set(grid.tolist())) > 9_990
    assert 0 <= grid.min() < grid.max() < 1
    assert np.abs(np.histogram(grid, bins=10)[0] - 1000).max() < 150
    by_seed = grid.reshape(100, 100)
    for lagged in (np.corrcoef(by_seed[:-1].ravel(), by_seed[1:].ravel()), np.corrcoef(grid[:-1], grid[1:])):
        assert abs(lagged[0, 1]) < 0.05


def test_penalties_are_vllms() -> None:
    """Repetition counts the prompt too and divides what is positive; presence and frequency count the answer alone."""
    logits = floats([[1.0, 2.0, -3.0, 4.0, 0.5]])
    penalised = sequence(
        (0, 2), (1, 1), temperature=0.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5
    )
    draw(logits, [penalised], [4])
    assert logits.tolist() == [[0.5, 2.0 / 2 - 2 * 0.5 - 0.25, -6.0, 4.0, 0.5]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("penalty", "token"), [(1e-45, 0), (3e38, 1)])
def test_a_repetition_penalty_of_any_size_leaves_numbers(penalty: float, token: int, temperature: float) -> None:
    """The least made a logit infinite: its request failed with INTERNAL, and all of its step was computed twice."""
    logits = floats([[1.0, 90.0, -3.0]])
    repeated = sequence((0, 2), temperature=temperature, repetition_penalty=penalty)
    assert draw(logits, [repeated], [2]) == [token]
    assert np.isfinite(logits).all()


def test_bias_comes_before_penalties() -> None:
    logits = floats([[1.0, 0.0]])
    biased = sequence((0,), temperature=0.0, logit_bias={0: 3.0, 1: -1.0}, repetition_penalty=2.0)
    assert draw(logits, [biased], [1]) == [0]
    assert logits.tolist() == [[2.0, -1.0]]


def test_constraint_allows_its_tokens_alone() -> None:
    logits = floats([[9.0, 1.0, 2.0], [9.0, 1.0, 2.0]])
    assert draw(logits, [sequence(allowed=[1, 2], temperature=0.0), sequence(temperature=0.0)], [1, 1]) == [2, 0]


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [0.0, math.inf, 1.0], [NEG, NEG, NEG]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_are_no_numbers_are_refused(row: list[float], temperature: float) -> None:
    logits = floats([[1.0, 2.0, 3.0], row])
    with pytest.raises(FloatingPointError, match=r"rows \[1\] of the logits"):
        draw(logits, [sequence(temperature=temperature)] * 2, [1, 1])


def test_forbidden_tokens_are_never_drawn() -> None:
    counts = draw_many([NEG, 0.0, NEG, 0.0, NEG], count=2000)
    assert set(counts) == {1, 3}


def test_constraint_that_allows_nothing() -> None:
    with pytest.raises(FloatingPointError, match="allow no token"):
        draw(floats([[0.0] * 4] * 1), [sequence(allowed=[])], [1])


def test_bias_of_a_batch_stays_in_its_rows() -> None:
    logits = floats([[0.0] * 4] * 3)
    rows = [sequence(logit_bias={3: 5.0, 0: 1.0}), sequence(), sequence(logit_bias={1: -100.0})]
    draw(logits, rows, [1, 1, 1])
    assert logits.tolist() == [[1.0, 0.0, 0.0, 5.0], [0.0] * 4, [0.0, -100.0, 0.0, 0.0]]


def test_stop_tokens_are_held_back_before_min_tokens() -> None:
    """The prompt has 2 tokens and the answer must have 3: positions 2, 3 and 4 take the best of the others."""
    held = sequence((0, 0), temperature=0.0, work={"min_tokens": 3, "stop_token_ids": frozenset({1, 3})})
    free = sequence((0, 0), temperature=0.0, work={"stop_token_ids": frozenset({1, 3})})
    logits = floats([[0.0, 9.0, 1.0, 8.0]] * 5)
    assert draw(logits, [held, held, held, held, free], [2, 3, 4, 5, 2]) == [2, 2, 2, 1, 1]


def test_stop_tokens_held_back_are_stronger_than_bias() -> None:
    held = sequence(temperature=0.0, logit_bias={1: 100.0}, work={"min_tokens": 1, "stop_token_ids": frozenset({1})})
    assert draw(floats([[0.0] * 3] * 1), [held], [1]) == [0]


def test_log_probabilities_are_the_raw_ones() -> None:
    """Before bias, penalties, temperature and all that removes tokens."""
    probabilities = [0.5, 0.25, 0.2, 0.05]
    row = floats([[math.log(p) + 3.0 for p in probabilities]])
    twisted = sequence((0,), (0,), logit_bias={3: 50.0}, temperature=0.3, top_k=1, work={"num_logprobs": 2})
    drawn = sampler.draw(row, [Place(twisted, 2)])
    assert drawn.tokens == [3]
    assert drawn.logprobs[0].logprob == pytest.approx(math.log(0.05), abs=1e-6)
    ids, values = zip(*drawn.logprobs[0].top, strict=True)
    assert ids == (0, 1)
    assert values == pytest.approx([math.log(0.5), math.log(0.25)], abs=1e-6)


def test_log_probabilities_of_a_mixed_batch() -> None:
    """Rows get as many as each asks for, more than there are tokens included; who does not ask gets none."""
    logits = random_logits(4, 6)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counts = [None, 0, 3, 50]
    rows = [sequence(seed=i, work={"num_logprobs": count}) for i, count in enumerate(counts)]
    drawn = sampler.draw(logits, [Place(each, 1) for each in rows])
    assert set(drawn.logprobs) == {1, 2, 3}
    for i, size in ((1, 0), (2, 3), (3, 6)):
        found = drawn.logprobs[i]
        assert found.logprob == pytest.approx(expected[i, drawn.tokens[i]].item(), abs=1e-6)
        best = np.argsort(-expected[i])[:size]
        assert [token for token, _ in found.top] == best.tolist()
        assert [value for _, value in found.top] == pytest.approx(expected[i][best].tolist(), abs=1e-6)


def test_nobody_asks_for_log_probabilities() -> None:
    assert sampler.draw(floats([[0.0] * 3] * 2), [Place(sequence(), 1)] * 2).logprobs == {}


def test_guesses_count_like_tokens_of_the_answer() -> None:
    """What is drawn behind guesses is what would be drawn if they were tokens: penalties, seed and held-back stops."""
    params = {"seed": 9, "repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    work = {"min_tokens": 4, "stop_token_ids": frozenset({5})}
    logits = random_logits(4, 12) * 2
    guesses = (7, 7, 2)
    guessed = [Place(sequence((1, 2), (3,), work=work, **params), 3 + n, guesses[:n]) for n in range(4)]
    known = [Place(sequence((1, 2), (3, *guesses[:n]), work=work, **params), 3 + n) for n in range(4)]
    behind, plain = logits.copy(), logits.copy()
    assert sampler.draw(behind, guessed).tokens == sampler.draw(plain, known).tokens
    assert np.array_equal(behind, plain)
