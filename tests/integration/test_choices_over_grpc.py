"""Choices, log probabilities, bias and answers that go on, from the client through a cluster to the real model."""

from __future__ import annotations

import math

import pytest
from octavo.client import Client, Completion, FinishReason

from tests.cluster import ClusterProcess

pytestmark = pytest.mark.cluster

PROMPT = "The capital of France is"


async def ask(cluster: ClusterProcess, **options: object) -> Completion:
    async with Client(cluster.address) as client:
        return await client.complete(PROMPT, timeout=150, **options)  # type: ignore[arg-type]


async def test_each_choice_is_what_its_seed_gives_alone(model_cluster: ClusterProcess) -> None:
    several = await ask(model_cluster, n=3, seed=40, max_tokens=6, ignore_eos=True)
    assert len({choice.token_ids for choice in several.choices}) == 3
    assert several.usage is not None
    assert several.usage.generated_tokens == 18
    for index, choice in enumerate(several.choices):
        alone = await ask(model_cluster, seed=40 + index, max_tokens=6, ignore_eos=True)
        assert (choice.token_ids, choice.text) == (alone.token_ids, alone.text)


async def test_the_best_of_four_have_the_largest_sums(model_cluster: ClusterProcess) -> None:
    options: dict[str, object] = {"seed": 7, "max_tokens": 6, "ignore_eos": True, "logprobs": 2, "temperature": 1.0}
    all_four = await ask(model_cluster, n=4, **options)
    best = await ask(model_cluster, n=2, best_of=4, **options)
    sums = {choice.token_ids: sum(each.logprob for each in choice.logprobs) for choice in all_four.choices}
    assert [choice.token_ids for choice in best.choices] == sorted(sums, key=lambda ids: -sums[ids])[:2]
    for choice in all_four.choices:
        for each in choice.logprobs:
            assert len(each.top) == 2
            assert -math.inf < each.logprob <= each.top[0][1] <= 0.0


async def test_an_answer_goes_on_where_it_was_cut(model_cluster: ClusterProcess) -> None:
    """Penalties, seeded draws and the search for the stop string count what was received."""
    options: dict[str, object] = {
        "seed": 3, "max_tokens": 16, "frequency_penalty": 1.0, "repetition_penalty": 1.1, "ignore_eos": True,
    }  # fmt: skip
    whole = await ask(model_cluster, **options)
    stop = whole.text[-12:-4]
    stopped = await ask(model_cluster, stop=stop, **options)
    cut = 9
    rest = await ask(model_cluster, received_token_ids=[whole.token_ids[:cut]], **options)
    assert whole.token_ids[:cut] + rest.token_ids == whole.token_ids
    assert whole.text.endswith(rest.text)
    rest = await ask(model_cluster, received_token_ids=[stopped.token_ids[:cut]], stop=stop, **options)
    assert stopped.token_ids[:cut] + rest.token_ids == stopped.token_ids
    assert rest.finish == stopped.finish
    assert rest.finish is not None
    assert rest.finish.stop == stop


async def test_each_choice_goes_on_where_it_was_cut(model_cluster: ClusterProcess) -> None:
    options: dict[str, object] = {"n": 3, "seed": 3, "max_tokens": 12, "frequency_penalty": 1.0, "ignore_eos": True}
    whole = await ask(model_cluster, **options)
    received = [choice.token_ids[:cut] for choice, cut in zip(whole.choices, (0, 5, 12), strict=True)]
    rest = await ask(model_cluster, received_token_ids=received, **options)
    for had, before, after in zip(received, whole.choices, rest.choices, strict=True):
        assert had + after.token_ids == before.token_ids
        assert before.text.endswith(after.text)
        assert after.finish == before.finish


async def test_a_bias_rules_and_min_tokens_hold_the_end_back(model_cluster: ClusterProcess) -> None:
    first = (await ask(model_cluster, temperature=0.0, max_tokens=1)).token_ids[0]
    assert (await ask(model_cluster, temperature=0.0, max_tokens=1, logit_bias={first: -100.0})).token_ids[0] != first
    forced = await ask(model_cluster, temperature=0.0, max_tokens=5, logit_bias={first: 100.0})
    assert forced.token_ids == (first,) * 5
    options: dict[str, object] = {"temperature": 0.0, "max_tokens": 8, "stop_token_ids": [first]}
    assert len((await ask(model_cluster, **options)).token_ids) == 1
    held = await ask(model_cluster, min_tokens=4, **options)
    assert len(held.token_ids) > 4
    assert first not in held.token_ids[:4]
    assert held.finish is not None
    assert held.finish.reason in (FinishReason.STOP, FinishReason.LENGTH)
