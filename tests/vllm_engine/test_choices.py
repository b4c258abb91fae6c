"""What vLLM tells of one request, as the deltas of a choice."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from workers.types import FinishReason, GenerateWork, TokenDelta, WorkId
from workers.vllm_engine.choices import Choice
from workers.vllm_engine.outbox import Outbox


def make_choice(index: int = 0) -> tuple[Choice, list[TokenDelta]]:
    emitted: list[TokenDelta] = []
    work = GenerateWork(work_id=WorkId("r", 1), prompt=(1, 2, 3), max_tokens=4, n=2)
    return Choice(work, index, 10.0, emitted.append), emitted


def told(tokens: list[int], reason: str | None = None, cached: int | None = 0, **times: float) -> Any:
    metrics = SimpleNamespace(scheduled_ts=10.5, first_token_ts=11.5, last_token_ts=13.0, num_preemptions=2)
    metrics.__dict__.update(times)
    output = SimpleNamespace(token_ids=tokens, finish_reason=reason, stop_reason=None, logprobs=None)
    return SimpleNamespace(outputs=[output], num_cached_tokens=cached, metrics=metrics)


def test_times_are_those_of_vllms_engine() -> None:
    choice, emitted = make_choice()
    choice.add(told([5], cached=2), 11.6)
    choice.add(told([6, 7], "length"), 13.2)
    assert [delta.token_ids for delta in emitted] == [(5,), (6, 7)]
    assert [delta.num_cached_tokens for delta in emitted] == [2, None]
    finish = emitted[-1].finish
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH
    assert (finish.queue_s, finish.prefill_s, finish.decode_s) == (0.5, 1.0, 1.5)
    assert (finish.ended_at, finish.num_preemptions) == (13.0, 2)
    assert finish.num_steps == finish.num_tokens == 3


@pytest.mark.parametrize("times", [{"scheduled_ts": 0.0}, {"first_token_ts": 0.0}])
def test_what_vllm_does_not_tell_is_measured(times: dict[str, float]) -> None:
    choice, emitted = make_choice()
    choice.add(told([5], **times), 11.5)
    choice.add(told([6], "stop", **times), 13.5)
    finish = emitted[-1].finish
    assert finish is not None
    assert (finish.queue_s, finish.prefill_s, finish.decode_s, finish.ended_at) == (0.0, 1.5, 2.0, 13.5)


def test_a_choice_ends_once_and_the_cache_is_told_of_once_a_work() -> None:
    choice, emitted = make_choice(index=1)
    choice.add(told([5], cached=2), 11.0)
    choice.end(FinishReason.CANCELLED, 12.0)
    choice.end(FinishReason.DEADLINE, 12.5)
    choice.add(told([6], "length"), 13.0)
    assert [delta.finish.reason for delta in emitted if delta.finish] == [FinishReason.CANCELLED]
    assert all(delta.num_cached_tokens is None for delta in emitted)
    assert choice.owed_tokens == 0


async def test_news_of_one_turn_are_told_once() -> None:
    told_at: list[int] = []
    outbox = Outbox(asyncio.get_running_loop(), lambda: told_at.append(1))
    for _ in range(3):
        outbox.emit(TokenDelta(WorkId("r", 1)))
    outbox.add_events([])
    assert told_at == []
    await asyncio.sleep(0)
    assert told_at == [1]
    assert len(outbox.take_outputs()) == 3
    assert outbox.take_outputs() == []
    await asyncio.to_thread(outbox.emit, TokenDelta(WorkId("r", 2)))
    assert told_at == [1, 1]
