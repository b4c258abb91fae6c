"""Runs a case of `covering`: prompts with known greedy answers, under its conditions, against those answers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.oracle.answers import GREEDY, Committed
from tests.oracle.covering import Case
from workers.engine import PagedEngine
from workers.types import FinishReason, GenerateWork, Load, SamplingParams, WorkId

NewEngine = Callable[..., PagedEngine]
"""Takes chunk_tokens, max_num_sequences, num_blocks, max_model_len and lookup_tokens."""


@dataclass
class Choice:
    tokens: list[int]
    num_cached_tokens: int = 0


def run_case(
    case: Case, entries: list[Committed], num_tokens: int, new_engine: NewEngine, *, block_size: int, seed: int
) -> Load:
    """Let an engine answer the prompts of `entries` with `num_tokens` each, as many at once as the case says; assert
    that it answers right, finds what is cached, and gives everything back. Return its last load report."""
    longest = max(len(entry.prompt) for entry in entries) + num_tokens
    blocks = -(-longest // block_size)
    engine = new_engine(
        chunk_tokens=case.chunk_tokens,
        max_num_sequences=max(case.batch, case.n),
        num_blocks=blocks + 1 if case.is_starved else (len(entries) + 1) * blocks * case.n,
        max_model_len=longest,
        lookup_tokens=case.lookup_tokens,
    )
    numbers = random.Random(seed)
    for wave in _waves(entries, case):
        if case.is_warm:
            answer(engine, [_work(number, entry, 1) for number, entry in enumerate(wave)])
        cuts = [numbers.randrange(1, num_tokens) if case.resumes else 0 for _ in wave]
        works = [_work(i, entry, num_tokens, n=case.n, cut=cuts[i]) for i, entry in enumerate(wave)]
        choices = answer(engine, works, in_turn=not case.in_flight)
        for (number, index), choice in choices.items():
            entry = wave[number]
            assert choice.tokens == entry.answer[cuts[number] : num_tokens], f"{entry.name}, choice {index}"
        if not case.is_starved:
            _assert_cached(case, wave, choices, block_size)
    engine.check_integrity()
    load = engine.load()
    assert load.num_free_blocks == load.num_blocks
    return load


def answer(engine: PagedEngine, works: list[GenerateWork], *, in_turn: bool = False) -> dict[tuple[int, int], Choice]:
    """Return by number of the work and index of the choice what was generated. `in_turn`: each work is submitted when
    the one before has brought its first token; otherwise all at once."""
    choices = {(work.work_id.number, index): Choice([]) for work in works for index in range(work.n)}
    waiting = list(reversed(works))
    engine.submit(waiting.pop())
    while waiting and not in_turn:
        engine.submit(waiting.pop())
    latest, num_finished = works[0].work_id, 0
    while engine.step():
        for delta in engine.drain_outputs():
            choice = choices[delta.work_id.number, delta.index]
            choice.tokens += delta.token_ids
            choice.num_cached_tokens += delta.num_cached_tokens or 0
            if delta.finish is not None:
                assert delta.finish.reason is FinishReason.LENGTH, delta.finish
                num_finished += 1
            if waiting and delta.work_id == latest:
                latest = waiting[-1].work_id
                engine.submit(waiting.pop())
    assert num_finished == len(choices)
    return choices


def seeded_choices(new_engine: NewEngine, prompt: list[int], num_tokens: int, sampling: SamplingParams) -> None:
    """Assert that 3 choices of a seeded work are what 3 works with the seeds of the choices answer."""
    options = {"chunk_tokens": 64, "max_num_sequences": 3, "num_blocks": 256, "max_model_len": len(prompt) + num_tokens}

    def work(number: int, n: int) -> GenerateWork:
        seed = sampling.seed + number
        params = SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, seed=seed)
        return GenerateWork(
            work_id=WorkId("seeded", number), prompt=prompt, sampling=params, max_tokens=num_tokens, n=n
        )

    together = answer(new_engine(**options), [work(0, 3)])
    single = [answer(new_engine(**options), [work(number, 1)])[number, 0].tokens for number in range(3)]
    assert [together[0, index].tokens for index in range(3)] == single
    assert len({tuple(tokens) for tokens in single}) == 3


def num_prompts(case: Case) -> int:
    """Return how many different prompts are answered at once."""
    num_requests = max(1, case.batch // case.n)
    return num_requests // 2 if _has_twins(case) else num_requests


def _has_twins(case: Case) -> bool:
    return case.in_flight and case.batch // case.n > 1


def _waves(entries: list[Committed], case: Case) -> Iterator[list[Committed]]:
    """Split `entries` into what is submitted together; in flight every prompt has a twin, if there is room."""
    size, has_twins = num_prompts(case), _has_twins(case)
    for start in range(0, len(entries), size):
        wave = entries[start : start + size]
        yield wave * 2 if has_twins else wave


def _work(number: int, entry: Committed, num_tokens: int, *, n: int = 1, cut: int = 0) -> GenerateWork:
    return GenerateWork(
        work_id=WorkId("oracle", number),
        prompt=entry.prompt,
        received=[entry.answer[:cut]] * n if cut else (),
        sampling=GREEDY,
        max_tokens=num_tokens,
        n=n,
    )


def _assert_cached(case: Case, wave: list[Committed], choices: dict[tuple[int, int], Choice], block_size: int) -> None:
    """With blocks enough, a warm cache has all full blocks of a prompt, and so has the twin that came first."""
    num_first = 0 if case.is_warm else len(wave) // 2 if _has_twins(case) else len(wave)
    for number in range(num_first, len(wave)):
        full = (len(wave[number].prompt) - 1) // block_size * block_size
        assert choices[number, 0].num_cached_tokens >= full, wave[number].name
