"""Committed answers, and those of an engine, stepped by hand until every request has ended."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from tests.oracle.regenerate import ANSWERS
from workers.types import FinishReason, GenerateWork, SamplingParams, SteppedEngine, WorkId

GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True)
class Committed:
    """A prompt of the oracle and the reference's greedy answer to it."""

    name: str
    prompt: list[int]
    answer: list[int]
    gap: float


def committed_answers() -> list[Committed]:
    return [Committed(**entry) for entry in json.loads(ANSWERS.read_text())]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    num_preemptions: int = 0


def generate(
    engine: SteppedEngine,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    sampling: SamplingParams = GREEDY,
    received: list[list[int]] | None = None,
) -> list[Answer]:
    """Submit all prompts at once; return what was generated, in their order. `max_tokens` counts what was received."""
    for number, prompt in enumerate(prompts):
        engine.submit(
            GenerateWork(
                work_id=WorkId("oracle", number),
                prompt=prompt,
                received=[received[number]] if received else (),
                sampling=sampling,
                max_tokens=max_tokens,
            )
        )
    answers = [Answer() for _ in prompts]
    num_finished = 0
    is_busy = True
    while is_busy:
        is_busy = engine.step()
        for delta in engine.drain_outputs():
            answer = answers[delta.work_id.number]
            answer.tokens += delta.token_ids
            answer.num_cached_tokens += delta.num_cached_tokens or 0
            if delta.finish is not None:
                assert delta.finish.reason is FinishReason.LENGTH, delta.finish
                answer.num_preemptions = delta.finish.num_preemptions
                num_finished += 1
    assert num_finished == len(prompts)
    return answers
