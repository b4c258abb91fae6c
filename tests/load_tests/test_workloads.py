"""Prompts: of the right lengths, the same for everybody within a repetition, and never again."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from load_tests.measurement import AskError, Sample, measure, summarise
from load_tests.natural_text import NaturalText
from load_tests.workloads import RANDOM_IDS, WORKLOADS, Workload, make_prompts, warm_up_prompts

NATURAL = range(50_000, 60_000)
TEXT = NaturalText(list(NATURAL))
"""Distinct ids outside those that are drawn at random: where each token is from can be told."""
BY_NAME = {workload.name: workload for workload in WORKLOADS}


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_lengths_and_halves(workload: Workload) -> None:
    prompts = make_prompts(workload, TEXT, seed=1, repetition=0)
    assert len(prompts) == workload.requests
    for number, prompt in enumerate(prompts):
        assert len(prompt) == workload.shared + workload.own
        own = prompt[workload.shared :]
        if number % 2 == 0:
            assert own[0] in RANDOM_IDS
            assert own[1:] == list(range(own[1], own[1] + workload.own - 1))
            assert own[1] in NATURAL
        else:
            assert all(token_id in RANDOM_IDS for token_id in own)


def test_one_prefix_is_shared_half_natural_half_random() -> None:
    workload = BY_NAME["prefix"]
    prompts = make_prompts(workload, TEXT, seed=1, repetition=0)
    (shared,) = {tuple(prompt[: workload.shared]) for prompt in prompts}
    assert [token_id in NATURAL for token_id in shared] == [False] + [True] * 255 + [False] * 256


def test_no_prompt_comes_twice() -> None:
    runs = [(seed, repetition) for seed in (1, 2) for repetition in (0, 1)]
    for workload in WORKLOADS:
        prompts = [
            tuple(prompt)
            for seed, repetition in runs
            for prompt in make_prompts(workload, TEXT, seed=seed, repetition=repetition)
        ]
        assert len(set(prompts)) == len(runs) * workload.requests


def test_outside_prefix_no_two_prompts_begin_with_the_same_block() -> None:
    """Not even of a text that says the same again and again."""
    for workload in (each for each in WORKLOADS if not each.shared):
        prompts = make_prompts(workload, NaturalText([50_000] * 2_000), seed=3, repetition=0)
        assert len({tuple(prompt[:16]) for prompt in prompts}) == len(prompts)


def test_everybody_gets_the_same() -> None:
    for workload in WORKLOADS:
        first, second = (make_prompts(workload, TEXT, seed=1, repetition=2) for _ in range(2))
        assert first == second
    assert warm_up_prompts(seed=1, repetition=2) == warm_up_prompts(seed=1, repetition=2)


def test_short_forms_are_short() -> None:
    for workload in WORKLOADS:
        short = workload.shortened()
        assert short.requests * short.output <= 32
        assert (short.shared, short.own, short.name) == (workload.shared, workload.own, workload.name)


def test_windows_are_of_the_text_and_begin_at_different_places() -> None:
    text = NaturalText(list(range(20)))
    windows = text.windows(random.Random(0), 11, 10)
    assert sorted(window[0] for window in windows) == list(range(11))
    assert all(window == list(range(window[0], window[0] + 10)) for window in windows)


async def test_text_that_somebody_else_tokenises() -> None:
    async def tokenize(text: str) -> list[int]:
        return [len(text)]

    text = await NaturalText.ask(tokenize)
    assert len(text) > 50


class FakeDriver:
    """Answers after a turn of the loop, with as many tokens as it is told to; knows how many it was asked at once."""

    def __init__(self, short_by: int = 0) -> None:
        self._short_by = short_by
        self._now = 0
        self.most = 0

    async def ask(self, prompt: Sequence[int], num_tokens: int) -> Sample:
        self._now += 1
        self.most = max(self.most, self._now)
        await asyncio.sleep(0)
        self._now -= 1
        return Sample(first_token_s=0.25, total_s=1.25, num_tokens=num_tokens - self._short_by, num_cached=None)


async def test_measuring_keeps_to_the_concurrency() -> None:
    workload = BY_NAME["conc16"]
    driver = FakeDriver()
    measurement, samples = await measure(driver, workload, make_prompts(workload, TEXT, seed=1, repetition=0))
    assert driver.most == 16
    assert measurement.requests == len(samples) == 48


async def test_a_shorter_answer_is_no_answer() -> None:
    workload = BY_NAME["single"]
    with pytest.raises(AskError, match="127 tokens, asked for 128"):
        await measure(FakeDriver(short_by=1), workload, make_prompts(workload, TEXT, seed=1, repetition=0))


def test_figures() -> None:
    samples = [
        Sample(first_token_s=0.1, total_s=1.1, num_tokens=11, num_cached=0),
        Sample(first_token_s=0.3, total_s=2.3, num_tokens=11, num_cached=16),
    ]
    measurement = summarise("single", 4.0, samples)
    assert measurement.output_tokens_per_s == 5.5
    assert measurement.requests_per_s == 0.5
    assert measurement.first_token_p50_ms == 200.0
    assert measurement.first_token_max_ms == 300.0
    assert measurement.per_token_p50_ms == 150.0
    assert measurement.cached_tokens == 16
