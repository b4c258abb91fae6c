"""Thousands of random operations on a pool of 9 blocks: nothing is lost, leaked, wrong or ended twice."""

from __future__ import annotations

import random

import pytest
from octavo.names import Reason

from tests.workers.toy_engine import Answer, ToyEngine, ToyRunner, assert_idle, gather, toy_answer, work
from workers.types import FinishReason, GenerateWork, WorkId

NUM_BLOCKS = 9
NUM_WORDS = 4
"""So few that prefixes collide and some guesses are right."""
POISON = 666

Answers = dict[int, dict[WorkId, Answer]]
"""By choice."""


def some_work(rng: random.Random, number: int, now: float, *, with_poison: bool) -> GenerateWork:
    prompt = [rng.choice((0, 0, 1)) for _ in range(rng.randint(1, 20))]
    if with_poison and rng.random() < 0.01:
        prompt[rng.randrange(len(prompt))] = POISON
    max_tokens, n = rng.randint(1, 18), rng.choice((1, 1, 1, 2, 4))
    cuts = [rng.randrange(max_tokens) for _ in range(n)] if rng.random() < 0.1 else ()
    return work(
        number,
        prompt,
        max_tokens,
        n=n,
        priority=rng.randint(-1, 1),
        deadline=now + rng.uniform(0.0, 40.0) if rng.random() < 0.3 else None,
        stop_token_ids=frozenset({rng.randrange(NUM_WORDS)}),
        min_tokens=rng.choice((0, 0, 5)),
        salt=rng.choice((b"", b"a")),
        received=[[rng.randrange(NUM_WORDS) for _ in range(cut)] for cut in cuts],
    )


def soak(
    engine: ToyEngine, rng: random.Random, num_steps: int, *, with_poison: bool
) -> tuple[list[GenerateWork], Answers]:
    works: list[GenerateWork] = []
    answers: Answers = {index: {} for index in range(4)}
    while engine.load().num_steps < num_steps:
        engine.clock.now += 0.1
        dice = rng.random()
        if dice < 0.3 and engine.load().num_waiting < 12:
            works.append(some_work(rng, len(works), engine.clock.now, with_poison=with_poison))
            engine.submit(works[-1])
        elif dice < 0.33 and works:
            engine.abort(rng.choice(works[-20:]).work_id)
        engine.step_checked()
        drain(engine, answers)
    while engine.step_checked():
        pass
    drain(engine, answers)
    return works, answers


def drain(engine: ToyEngine, answers: Answers) -> None:
    deltas = engine.drain_outputs()
    for index, of_choice in answers.items():
        gather(deltas, of_choice, index)


@pytest.mark.parametrize(
    ("num_steps", "lag", "reserve", "lookup_tokens"),
    [(10_000, 0, False, 3), (2_000, 0, False, 0), (2_000, 1, False, 0), (2_000, 1, False, 3), (2_000, 0, True, 3)],
)
def test_soak(num_steps: int, lag: int, reserve: bool, lookup_tokens: int) -> None:
    """After every step all invariants hold, and a reader of the KV events knows what is resident."""
    engine = ToyEngine(
        NUM_BLOCKS,
        chunk_tokens=7,
        max_num_sequences=5,
        lag=lag,
        reserve=reserve,
        lookup_tokens=lookup_tokens,
        runner=ToyRunner(NUM_BLOCKS, vocab_size=NUM_WORDS, poison=POISON),
    )
    works, answers = soak(engine, random.Random(num_steps), num_steps, with_poison=not lag)
    assert_idle(engine)
    load = engine.load()
    assert (load.num_preemptions > 20) == (not reserve)
    assert (load.num_accepted_tokens > 100) == (lookup_tokens > 0)
    reasons = set()
    for one in works:
        for index in range(one.n):
            whole = toy_answer(one, NUM_WORDS, index=index)
            answer = answers[index].pop(one.work_id)
            reasons.add(answer.finish)
            assert answer.tokens == whole[: len(answer.tokens)]
            if answer.finish in (FinishReason.STOP, FinishReason.LENGTH):
                assert answer.tokens == whole
            if answer.finish is FinishReason.ERROR:
                assert answer.last is not None
                assert answer.last.finish is not None
                assert POISON in one.prompt or answer.last.finish.error_reason == Reason.PROMPT_TOO_LONG
    assert not any(answers.values())
    assert reasons >= {FinishReason.STOP, FinishReason.LENGTH, FinishReason.CANCELLED, FinishReason.DEADLINE}
