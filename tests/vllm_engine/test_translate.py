"""Works as vLLM's arguments, its outputs as ours."""

from __future__ import annotations

from types import SimpleNamespace

from workers.types import FinishReason, GenerateWork, SamplingParams, TokenLogprobs, WorkId
from workers.vllm_engine import translate


def make_work(**fields: object) -> GenerateWork:
    given = {"prompt": (1, 2, 3), "max_tokens": 10, "stop_token_ids": frozenset({7, 5}), **fields}
    return GenerateWork(work_id=WorkId("r", 1), **given)  # type: ignore[arg-type]


def test_a_greedy_work_has_no_seed() -> None:
    arguments = translate.sampling_of(make_work(sampling=SamplingParams(temperature=0.0, seed=3), min_tokens=2), 0)
    assert arguments == {
        "temperature": 0.0,
        "max_tokens": 10,
        "min_tokens": 2,
        "stop_token_ids": [5, 7],
        "ignore_eos": True,
    }


def test_all_that_is_asked_is_passed_on() -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=4,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=9,
        logit_bias={4: -1.0},
    )
    arguments = translate.sampling_of(make_work(sampling=sampling, num_logprobs=2), 0)
    assert {name: arguments[name] for name in ("temperature", "top_p", "top_k", "min_p", "seed")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "seed": 9,
    }
    assert arguments["repetition_penalty"] == 1.1
    assert (arguments["presence_penalty"], arguments["frequency_penalty"]) == (0.2, 0.3)
    assert arguments["logit_bias"] == {4: -1.0}
    assert arguments["logprobs"] == 2


def test_shapes_have_other_names() -> None:
    for asked, given in (
        (("json_object", ""), {"json_object": True}),
        (("json_schema", "{}"), {"json": "{}"}),
        (("regex", "a+"), {"regex": "a+"}),
        (("grammar", "root ::= x"), {"grammar": "root ::= x"}),
    ):
        work = make_work(sampling=SamplingParams(format=asked))
        assert translate.sampling_of(work, 0)["structured"] == given


def test_what_was_received_counts() -> None:
    work = make_work(received=((8, 9), (6,)), n=2, min_tokens=2, sampling=SamplingParams(seed=1))
    assert translate.prompt_of(work, 0) == [1, 2, 3, 8, 9]
    first, second = (translate.sampling_of(work, index) for index in (0, 1))
    assert (first["max_tokens"], first["min_tokens"]) == (8, 0)
    assert (second["max_tokens"], second["min_tokens"]) == (9, 1)


def test_choices_and_continuations_draw_differently() -> None:
    sampling = SamplingParams(seed=(1 << 64) - 1)
    seeds = [
        translate.sampling_of(make_work(sampling=sampling, received=received, n=2), index)["seed"]
        for received in ((), ((4,), (4,)))
        for index in (0, 1)
    ]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_log_probabilities_are_of_the_token_and_of_the_likeliest() -> None:
    found = [{5: SimpleNamespace(logprob=-3.0, rank=9), 1: SimpleNamespace(logprob=-0.1, rank=1)}]
    assert translate.logprobs_of([5], found, 1) == (TokenLogprobs(-3.0, ((1, -0.1),)),)
    assert translate.logprobs_of([5], found, 0) == (TokenLogprobs(-3.0, ()),)
    assert translate.logprobs_of([5], found, None) == ()


def test_ends_are_told_as_they_are() -> None:
    assert translate.finish_of(None, None, [1]) is None
    stop = translate.finish_of("stop", 7, [7])
    assert stop is not None
    assert (stop.reason, stop.stop_token_id) == (FinishReason.STOP, 7)
    for word, reason in (
        ("length", FinishReason.LENGTH),
        ("abort", FinishReason.CANCELLED),
        ("error", FinishReason.ERROR),
    ):
        finish = translate.finish_of(word, None, [])
        assert finish is not None
        assert finish.reason is reason
