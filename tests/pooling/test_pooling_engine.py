"""The queue and the batches of the engine for numbers, over a model that adds."""

from __future__ import annotations

from collections.abc import Sequence

from tests.workers.toy_engine import BLOCK_SIZE, toy_info
from workers.pooling import PoolingEngine
from workers.precedence import MAX_IDLE_STEPS
from workers.prefix import PrefixHasher
from workers.types import FinishReason, PoolWork, WorkId

POISON = 13


class Adder:
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def pool(self, works: Sequence[PoolWork]) -> list[tuple[float, ...]]:
        self.batches.append([work.work_id.number for work in works])
        if any(POISON in work.tokens for work in works):
            raise ValueError("poison")
        return [(float(sum(work.tokens)),) for work in works]


def submitted(*inputs: list[int]) -> PoolingEngine:
    engine = PoolingEngine(Adder(), info=toy_info(1), hasher=PrefixHasher(bytes(32), BLOCK_SIZE), step_tokens=8)
    for number, tokens in enumerate(inputs):
        engine.submit(PoolWork(work_id=WorkId("r", number), tokens=tokens))
    return engine


def test_each_step_is_told_with_the_works_in_it() -> None:
    """As those of engines that generate are: so it has a span, and metrics its time."""
    engine = submitted([1, 2, 3], [4, 5, 6, 7], [8, 9], [POISON], [6])
    watch = engine.watch()
    while engine.step():
        watch.ended()
    first, second = watch.drain()
    assert [chunk.sequence.work.work_id.number for chunk in first.plan.chunks] == [0, 1]
    assert (first.plan.number, first.plan.num_tokens, first.error) == (1, 7, "")
    assert first.run_s + first.emit_s == first.duration_s - first.schedule_s > 0
    assert [chunk.sequence.work.work_id.number for chunk in second.plan.chunks] == [2, 3, 4]
    assert (second.plan.number, second.error) == (2, "ValueError")


def test_one_that_fails_fails_alone_and_what_was_computed_counts_once() -> None:
    """Routers share work out by that number."""
    model = Adder()
    engine = PoolingEngine(model, info=toy_info(1), hasher=PrefixHasher(bytes(32), BLOCK_SIZE), step_tokens=8)
    for number, tokens in enumerate(([1, 2, 3], [POISON], [4, 5], [6])):
        engine.submit(PoolWork(work_id=WorkId("r", number), tokens=tokens))
    while engine.step():
        pass
    ends = {delta.work_id.number: (delta.finish, delta.pooled) for delta in engine.drain_outputs()}
    assert {number: finish and finish.reason for number, (finish, _) in ends.items()} == {
        number: FinishReason.ERROR if number == 1 else FinishReason.STOP for number in range(4)
    }
    assert [ends[number][1] for number in (0, 2, 3)] == [(6.0,), (9.0,), (6.0,)]
    assert model.batches == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert engine.load().num_computed_tokens == 6


def test_nobody_waits_for_ever_while_smaller_priorities_fill_every_step() -> None:
    """A work that a router had sent was passed by those of a smaller priority until its deadline, and held credit."""
    model = Adder()
    engine = PoolingEngine(model, info=toy_info(1), hasher=PrefixHasher(bytes(32), BLOCK_SIZE), step_tokens=8)
    for number in range(3):
        engine.submit(PoolWork(work_id=WorkId("low", number), tokens=[1] * 5, priority=1))
    for number in range(MAX_IDLE_STEPS + 4):
        engine.submit(PoolWork(work_id=WorkId("high", number + 3), tokens=[1] * 8))
        assert engine.step()
    took = [number for batch in model.batches for number in batch]
    assert [number for number in took if number < 3] == [0, 1, 2], "by arrival"
    assert model.batches[:MAX_IDLE_STEPS] == [[number + 3] for number in range(MAX_IDLE_STEPS)], "not before"
    assert [batch[0] for batch in model.batches[MAX_IDLE_STEPS : MAX_IDLE_STEPS + 3]] == [0, 1, 2], "one a step"
