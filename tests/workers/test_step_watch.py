"""What a watched engine tells of its steps, and what an engine counts for metrics."""

from __future__ import annotations

import threading
import time

from tests.workers.test_thread import PATIENCE_S, Consumer
from tests.workers.toy_engine import BLOCK_SIZE, Clock, ToyEngine, ToyRunner, ToyTicket, work
from workers.config import EngineConfig
from workers.fake import FakeEngine
from workers.plan import StepPlan
from workers.step_watch import MAX_RECORDS, StepRecord
from workers.types import FinishReason, WorkId


class SlowRunner(ToyRunner):
    """A step takes 8 s on the engine's clock, the last 2 of them for drawing."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(64)
        self._clock = clock

    def launch(self, plan: StepPlan) -> ToyTicket:
        ticket = super().launch(plan)
        self._clock.now += 6
        ticket.computed_at = self._clock.now  # type: ignore[attr-defined]
        self._clock.now += 2
        return ticket


def watched(engine: ToyEngine, max_steps: int = 1_000) -> list[StepRecord]:
    """Step until nothing is left, as a thread does."""
    watch = engine.watch()
    for _ in range(max_steps):
        is_busy = engine.step_checked()
        watch.ended()
        if not is_busy:
            return watch.drain()
    raise AssertionError("still busy")


def test_a_step_s_time_is_told_by_its_parts() -> None:
    clock = Clock()
    engine = ToyEngine(runner=SlowRunner(clock))
    engine.clock = engine._clock = clock
    watch = engine.watch()
    engine.submit(work(1, range(5), 3))
    engine.step()
    clock.now += 1
    watch.ended()
    (record,) = watch.drain()
    assert (record.schedule_s, record.run_s, record.sample_s, record.emit_s) == (0, 6, 2, 1)
    assert record.duration_s == record.ended - record.began == 9
    assert [chunk.sequence.work.work_id for chunk in record.plan.chunks] == [WorkId("r", 1)]
    assert record.plan.number == 1


def test_each_step_has_one_record_and_an_idle_one_none() -> None:
    engine = ToyEngine()
    for number in range(3):
        engine.submit(work(number, range(10 * number, 10 * number + 5), 4))
    records = watched(engine)
    assert [record.plan.number for record in records] == list(range(1, engine.load().num_steps + 1))
    assert all(record.sample_s == 0 for record in records), "this runner does not tell drawing apart"


def test_what_happened_to_blocks_is_in_the_record_of_its_step() -> None:
    """Two sequences of 6 blocks each, in a pool of 8: one gives its blocks up, and what was cached makes way."""
    engine = ToyEngine(8)
    engine.submit(work(0, range(40, 48), 1))
    engine.run()
    assert engine.counts().num_cached_blocks == 2
    for number in (1, 2):
        engine.submit(work(number, [number] * BLOCK_SIZE, 5 * BLOCK_SIZE))
    records = watched(engine)
    preempted = [told for record in records for told in record.preempted]
    assert {work_id for work_id, _ in preempted} == {WorkId("r", 2)}
    assert max(count for _, count in preempted) == engine.load().num_preemptions >= 1
    assert sum(record.num_evicted_blocks for record in records) == engine.counts().num_evicted_blocks >= 2


def numbers(record: StepRecord) -> set[int]:
    """Return which works were in a step."""
    return {chunk.sequence.work.work_id.number for chunk in record.plan.chunks}


def test_a_step_that_failed_is_told_with_its_error() -> None:
    """And with all that were in it; those that follow are of whoever was not to blame."""
    engine = ToyEngine(poison=7)
    engine.submit(work(1, [1, 7], 3))
    engine.submit(work(2, [1, 2], 3))
    failed, *others = watched(engine)
    assert (failed.error, numbers(failed)) == ("PoisonError", {1, 2})
    assert (failed.sample_s, failed.emit_s) == (0, 0)
    assert failed.duration_s == failed.ended - failed.began >= 0
    assert [(record.error, numbers(record)) for record in others] == [("", {2})] * 2
    assert [record.plan.number for record in (failed, *others)] == [1, 2, 3]


def test_what_was_in_flight_behind_a_step_that_failed_is_told_as_well() -> None:
    engine = ToyEngine(poison=7, lag=1)
    engine.submit(work(1, [1, 2], 5))
    watch = engine.watch()
    engine.step()
    watch.ended()
    assert watch.drain() == [], "it is in flight"
    engine.submit(work(2, [1, 7], 3))
    engine.step()
    watch.ended()
    assert [(record.error, numbers(record)) for record in watch.drain()] == [
        ("PoisonError", {1}),
        ("PoisonError", {1, 2}),
    ]
    engine.submit(work(3, [1, 2], 2))
    assert [(record.error, numbers(record)) for record in watched(engine)] == [("", {3})] * 2


def test_the_step_that_broke_an_engine_is_told_before_its_works_end() -> None:
    engine = FakeEngine(EngineConfig(engine="fake"))
    consumer = Consumer(engine)

    def fail(plan: StepPlan) -> None:
        raise MemoryError

    engine._runner.launch = fail  # type: ignore[assignment, method-assign]
    engine._lag, engine._fatal_errors = 1, (MemoryError,)
    watch = consumer.thread.watch()
    consumer.thread.submit(work(1, [1, 2], 20))
    consumer.wait(lambda: consumer.ended(1))
    assert [(record.error, numbers(record)) for record in watch.drain()] == [("MemoryError", {1})]
    consumer.thread.close()
    assert consumer.thread.join(PATIENCE_S)


def test_counts_of_tokens() -> None:
    engine = ToyEngine(lookup_tokens=3, chunk_tokens=4)
    engine.submit(work(1, [1, 2, 3] * 4, 9))
    engine.submit(work(2, range(20, 30), 6, n=2))
    answers = engine.run()
    finish = answers[WorkId("r", 1)].last.finish  # type: ignore[union-attr]
    counts = engine.counts()
    assert counts.num_generated_tokens == 9 + 2 * 6
    assert counts.num_prompt_tokens == 12 + 2 * 10
    assert finish is not None
    assert finish.num_tokens == 9


def test_a_finish_says_in_how_many_steps_its_sequence_took_part() -> None:
    """Chunks of the prompt, tokens, a preemption, drafts: whatever it is, as many as its records."""
    engine = ToyEngine(8, chunk_tokens=6, lookup_tokens=2, runner=ToyRunner(8, vocab_size=2))
    engine.submit(work(1, [1, 2] * 5, 12))
    engine.submit(work(2, [3] * BLOCK_SIZE, 4 * BLOCK_SIZE))
    watch, finishes = engine.watch(), {}
    records: list[StepRecord] = []
    while engine.step_checked():
        watch.ended()
        records += watch.drain()
        finishes |= {delta.work_id.number: delta.finish for delta in engine.drain_outputs() if delta.finish}
    assert engine.load().num_preemptions
    assert engine.load().num_accepted_tokens
    for number, finish in finishes.items():
        part = [1 for record in records for chunk in record.plan.chunks if chunk.sequence.work.work_id.number == number]
        assert finish.num_steps == len(part)
        assert finish.num_tokens == finish_tokens(number)
        assert finish.reason is FinishReason.LENGTH


def finish_tokens(number: int) -> int:
    return {1: 12, 2: 4 * BLOCK_SIZE}[number]


def test_steps_in_flight_are_told_when_they_are_read() -> None:
    engine = ToyEngine(lag=1)
    engine.submit(work(1, range(5), 4))
    records = watched(engine)
    assert [record.plan.number for record in records] == list(range(1, engine.load().num_steps + 1))


def test_whoever_does_not_drain_costs_no_memory() -> None:
    engine = ToyEngine()
    watch = engine.watch()
    for number in range(MAX_RECORDS + 5):
        engine.submit(work(number, [1], 1))
        engine.step()
        engine.drain_outputs()
        watch.ended()
    assert len(watch.drain()) == MAX_RECORDS


def test_the_thread_tells_of_a_step_before_it_tells_its_tokens() -> None:
    consumer = Consumer(FakeEngine(EngineConfig(engine="fake", fake_step_s=0.002)))
    try:
        watch, told = consumer.thread.watch(), list[StepRecord]()
        consumer.thread.submit(work(1, [1, 2], 20))
        consumer.wait(lambda: consumer.ended(1))
        told += watch.drain()
        assert len(told) == 20
        assert all(record.run_s >= 0.002 for record in told)
        assert threading.current_thread().name not in consumer.notified_by
        assert told[-1].ended <= time.monotonic()
        assert consumer.thread.counts().num_generated_tokens == 20
    finally:
        consumer.thread.close()
        assert consumer.thread.join(PATIENCE_S)
