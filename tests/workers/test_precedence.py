"""Nobody waits for ever: the bound of `workers.precedence`, in steps, against those who would have others wait."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.workers.scheduler_bench import Bench
from tests.workers.toy_engine import toy_answer, work
from workers.precedence import MAX_IDLE_STEPS, MAX_PREEMPTIONS
from workers.sequence import Sequence
from workers.types import FinishReason, GenerateWork

URGENT, ORDINARY, PATIENT = -50, 0, 50
FIRST = 10_000
"""The number of a stream's first work."""


class Stream:
    """Adds work whenever fewer than `depth` of its own wait."""

    def __init__(self, bench: Bench, make: Callable[[int], GenerateWork], depth: int) -> None:
        self.bench = bench
        self.make = make
        self.depth = depth
        self.num_added = 0

    def refill(self) -> None:
        num_waiting = sum(s.work.work_id.number >= FIRST for s in self.bench.scheduler.waiting)
        for _ in range(num_waiting, self.depth):
            self.bench.add(self.make(FIRST + self.num_added))
            self.num_added += 1


def steps_until(bench: Bench, stream: Stream, condition: Callable[[], object], limit: int) -> int:
    for num_steps in range(limit + 1):
        if condition():
            return num_steps
        stream.refill()
        bench.step()
    raise AssertionError(f"not after {limit} steps")


def test_a_place_comes_free_for_who_was_passed_over_long_enough() -> None:
    bench = Bench(64, max_num_sequences=2)
    stream = Stream(bench, lambda n: work(n, [n], 10, priority=URGENT), depth=3)
    stream.refill()
    bench.step()
    patient = bench.add(work(1, range(8), 5, priority=PATIENT))
    started = steps_until(bench, stream, lambda: patient.started_at is not None, MAX_IDLE_STEPS + 10 + 1)
    assert started > MAX_IDLE_STEPS, "until then priorities hold"
    assert steps_until(bench, stream, lambda: patient.is_ended, 5) <= 5
    assert bench.answer(patient).tokens == toy_answer(patient.work)


def test_blocks_come_free_for_who_was_passed_over_long_enough() -> None:
    """It needs all blocks but one, and small urgent ones hold some at any time."""
    bench = Bench(12, max_num_sequences=8)
    stream = Stream(bench, lambda n: work(n, [n % 50, 3], 6, priority=URGENT), depth=8)
    stream.refill()
    bench.step()
    large = bench.add(work(1, range(40), 4, priority=PATIENT))
    steps_until(bench, stream, lambda: large.is_ended, MAX_IDLE_STEPS + 6 + 3 + 4)
    assert bench.answer(large).tokens == toy_answer(large.work)


def test_a_prefill_goes_on_under_endless_urgent_prefills() -> None:
    bench = Bench(64, chunk_tokens=4, max_num_sequences=3)
    patient = bench.add(work(1, range(20), 2, priority=PATIENT))
    bench.step()
    assert patient.num_computed == 4
    stream = Stream(bench, lambda n: work(n, [n * 8 + i for i in range(8)], 1, priority=URGENT), depth=2)
    steps_until(bench, stream, lambda: patient.is_ended, MAX_IDLE_STEPS + 20 // 4 + 2)
    assert patient.num_preemptions == 0


def test_who_was_preempted_often_enough_is_preempted_no_more() -> None:
    """Its prompt takes 14 steps and is lost each time that an urgent one comes to its third block."""
    bench = Bench(12, chunk_tokens=4, prefix_cache=False)
    stream = Stream(bench, lambda n: work(n, [n], 12, priority=URGENT), depth=0)
    patient = bench.add(work(1, range(40), 1, priority=PATIENT))

    def one_at_a_time() -> bool:
        stream.depth = int(all(s is patient for s in bench.scheduler.running))
        return patient.is_ended

    steps_until(bench, stream, one_at_a_time, (MAX_PREEMPTIONS + 2) * (12 + 2))
    assert patient.num_preemptions == MAX_PREEMPTIONS
    assert patient.num_idle_steps < MAX_IDLE_STEPS
    assert bench.answer(patient).tokens == toy_answer(patient.work)


def test_one_at_a_time_is_due_in_the_order_of_arrival() -> None:
    """So priorities still mean something when many patient ones wait under an endless urgent stream."""
    bench = Bench(64, max_num_sequences=4)
    stream = Stream(bench, lambda n: work(n, [n], 5, priority=URGENT), depth=5)
    stream.refill()
    bench.step()
    patient = [bench.add(work(n, [n, n], 6, priority=PATIENT - n)) for n in range(5)]
    ended: list[Sequence] = []

    def look() -> bool:
        ended.extend(s for s in patient if s.is_ended and s not in ended)
        assert sum(s in patient for s in bench.scheduler.running) <= 1
        return len(ended) == 5

    # Two more for each: one to be named when the last has ended, one in which the place was given away already.
    steps_until(bench, stream, look, MAX_IDLE_STEPS + 5 * (6 + 5 + 2))
    assert ended == patient


def test_who_fills_a_prefix_goes_as_early_as_who_waits_for_it() -> None:
    bench = Bench(128, chunk_tokens=8, max_num_sequences=4)
    prefix = list(range(64))
    filler = bench.add(work(1, [*prefix, 1, 1], 1, priority=PATIENT))
    bench.step()
    stream = Stream(bench, lambda n: work(n, [n * 8 + i for i in range(24)], 1, priority=ORDINARY), depth=2)
    stream.refill()
    for _ in range(5):
        stream.refill()
        bench.step()
    assert filler.num_computed == 8, "priorities hold"
    urgent = bench.add(work(2, [*prefix, 2, 2], 1, priority=URGENT))
    steps_until(bench, stream, lambda: urgent.is_ended, 64 // 8 + 1)
    assert bench.answer(urgent).num_cached_tokens == 64


def test_an_inherited_rank_goes_with_who_waited() -> None:
    bench = Bench(128, chunk_tokens=8)
    filler = bench.add(work(1, range(64), 1, priority=PATIENT))
    bench.step()
    other = bench.add(work(2, range(100, 164), 1, priority=ORDINARY))
    urgent = bench.add(work(3, range(64), 1, priority=URGENT))
    bench.step()
    assert (filler.num_computed, filler.rank) == (16, urgent.rank)
    bench.scheduler.end(urgent, FinishReason.CANCELLED, 0.0)
    bench.step()
    assert (filler.num_computed, filler.rank) == (16, filler.own_rank)
    assert other.num_computed == 8
    assert bench.scheduler.running == [other, filler]


def test_an_outsider_who_fills_inherits_nothing() -> None:
    bench = Bench(128, chunk_tokens=8)
    running = bench.add(work(1, range(100, 164), 1, priority=PATIENT))
    bench.step()
    urgent = bench.add(work(2, range(8), 1, priority=URGENT))
    (block,) = bench.pool.allocate(1, "an outsider") or ()
    bench.pool.promise(block, urgent.block_hashes(bench.hasher)[0])
    assert [c.sequence for c in bench.scheduler.schedule(0.0).chunks] == [running]
    assert urgent in bench.scheduler.waiting


@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_holds_under_adversarial_mixes(seed: int, reserve: bool) -> None:
    """Endless urgent work of all shapes, with prefixes that collide, in a pool that is always full."""
    rng = random.Random(seed)
    places, longest = 4, 24
    bench = Bench(8, chunk_tokens=6, max_num_sequences=places, reserve=reserve)

    def make(number: int, priority: int, *, shortest: int = 1, token: int = 0) -> GenerateWork:
        length = rng.randint(shortest, longest - 1)
        prompt = [token] * (length - 1) + [rng.randrange(2)]
        return work(number, prompt, rng.randint(1, longest - length), priority=priority)

    stream = Stream(bench, lambda n: make(n, rng.choice([URGENT, URGENT, ORDINARY])), depth=6)
    stream.refill()
    bench.step()
    born: dict[Sequence, tuple[int, int]] = {}
    """By sequence, the step in which it arrived and the bound on the steps until it ends."""
    for step in range(1_500):
        stream.refill()
        scheduler = bench.scheduler
        if step % 200 == 0:
            num_earlier = len(scheduler.waiting) + len(scheduler.running)
            bound = MAX_IDLE_STEPS + (MAX_PREEMPTIONS + 1) * longest + (num_earlier + 1) * (places + 2) * longest
            born[bench.add(make(step, PATIENT, shortest=20, token=step))] = (step, bound)
        bench.step()
        for sequence, (first, bound) in born.items():
            assert sequence.is_ended or step - first <= bound
    assert sum(s.is_ended for s in born) >= 3
    assert all(bench.answer(s).tokens == toy_answer(s.work) for s in born if s.is_ended)
    assert any(s.is_due for s in born)
