"""The scheduler alone: who goes when, in exact plans, and how sequences end. No runner but a function of the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.workers.scheduler_bench import Bench, shape
from tests.workers.toy_engine import toy_answer, work
from workers.sequence import Sequence
from workers.types import FinishReason


def test_one_sequence_from_prompt_to_length() -> None:
    bench = Bench(chunk_tokens=4)
    one = bench.add(work(1, range(10), 3))
    plans = [shape(bench.step()) for _ in range(6)]
    assert plans == [
        [(1, 0, 4, False)],
        [(1, 4, 4, False)],
        [(1, 8, 2, True)],
        [(1, 10, 1, True)],
        [(1, 11, 1, True)],
        [],
    ]
    answer = bench.answer(one)
    assert answer.tokens == toy_answer(one.work)
    assert (answer.finish, answer.num_deltas, answer.num_cached_tokens) == (FinishReason.LENGTH, 3, 0)
    assert bench.pool.num_free == 64
    assert bench.scheduler.commits.num_computed_tokens == 12
    assert bench.scheduler.num_steps == 5, "a step without work is none"


def test_decodes_go_first_and_a_prefill_chunk_fills_the_rest() -> None:
    bench = Bench(chunk_tokens=8)
    bench.add(work(1, [1, 2, 3], 9))
    bench.add(work(2, [4, 5], 9))
    assert shape(bench.step()) == [(1, 0, 3, True), (2, 0, 2, True)]
    bench.add(work(3, range(10, 30), 9))
    assert shape(bench.step()) == [(1, 3, 1, True), (2, 2, 1, True), (3, 0, 6, False)]
    bench.add(work(4, [7], 9))
    assert shape(bench.step()) == [(1, 4, 1, True), (2, 3, 1, True), (3, 6, 6, False)]
    assert shape(bench.step())[2:] == [(3, 12, 6, False)]
    assert shape(bench.step())[2:] == [(3, 18, 2, True), (4, 0, 1, True)]


def test_priority_goes_before_arrival() -> None:
    bench = Bench(chunk_tokens=4)
    for number, priority in [(1, 0), (2, 5), (3, -5), (4, 0)]:
        bench.add(work(number, [number] * 4, 1, priority=priority))
    assert [shape(bench.step())[0][0] for _ in range(4)] == [3, 1, 4, 2]


def test_an_urgent_sequence_goes_before_the_rest_of_a_long_prompt() -> None:
    bench = Bench(chunk_tokens=8)
    bench.add(work(1, range(30), 1))
    bench.step()
    bench.add(work(2, range(40, 46), 1, priority=-1))
    bench.add(work(3, [1, 2], 1))
    assert shape(bench.step()) == [(2, 0, 6, True), (1, 8, 2, False)]
    assert shape(bench.step()) == [(1, 10, 8, False)], "of equal priority the earlier goes first"


def test_no_more_run_than_may_and_than_can_decode_together() -> None:
    bench = Bench(chunk_tokens=16, max_num_sequences=3)
    narrow = Bench(chunk_tokens=2, max_num_sequences=8)
    for number in range(5):
        bench.add(work(number, [number], 9))
        narrow.add(work(number, [number], 9))
    bench.step()
    narrow.step()
    assert (len(bench.scheduler.running), len(bench.scheduler.waiting)) == (3, 2)
    assert (len(narrow.scheduler.running), len(narrow.scheduler.waiting)) == (2, 3)
    bench.run()
    narrow.run()
    assert all(a.finish is FinishReason.LENGTH for b in (bench, narrow) for a in b.answers.values())


def test_expired_work_is_dropped_before_prefill_and_while_it_decodes() -> None:
    bench = Bench(chunk_tokens=8)
    running = bench.add(work(1, [1, 2], 50, deadline=3.0))
    bench.step()
    bench.now = 1.0
    queued = bench.add(work(2, range(40), 5, deadline=2.0))
    bench.now = 2.0
    assert shape(bench.step()) == [(1, 2, 1, True)], "an expired prompt is not prefilled"
    bench.now = 3.5
    assert shape(bench.step()) == []
    assert bench.answer(queued).finish is bench.answer(running).finish is FinishReason.DEADLINE
    assert bench.answer(queued).tokens == []
    assert bench.answer(queued).num_cached_tokens is None
    assert bench.answer(running).tokens == toy_answer(running.work)[:2]
    assert bench.pool.num_free == 64


def test_finish_says_where_the_time_went() -> None:
    bench = Bench(chunk_tokens=4)
    bench.now = 1.0
    one = bench.add(work(1, range(8), 2))
    for now in (3.0, 7.0, 15.0):
        plan = bench.scheduler.schedule(now - 1)
        bench.scheduler.commit(plan, bench.runner.launch(plan).output(), now)
    bench.check()
    last = bench.answer(one).last
    assert last is not None
    assert last.finish is not None
    assert (last.finish.queue_s, last.finish.prefill_s, last.finish.decode_s) == (1.0, 5.0, 8.0)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_stop_token_ends_the_answer_and_is_part_of_it(at: int) -> None:
    whole = toy_answer(work(1, [1, 2, 3], 5))
    bench = Bench()
    one = bench.add(work(1, [1, 2, 3], 5, stop_token_ids=frozenset({whole[at]})))
    bench.run()
    answer = bench.answer(one)
    assert (answer.finish, answer.tokens) == (FinishReason.STOP, whole[: at + 1])
    assert answer.last is not None
    assert answer.last.finish is not None
    assert answer.last.finish.stop_token_id == whole[at]


def test_owed_prefill_is_what_waits_and_what_runs_short_of_a_decode() -> None:
    bench = Bench(chunk_tokens=8)
    bench.add(work(1, [1, 2], 9))
    bench.add(work(2, range(10, 30), 9))
    assert bench.scheduler.owed_prefill_tokens == 22
    bench.step()
    assert bench.scheduler.owed_prefill_tokens == 14, "a sequence that decodes owes nothing"


def test_a_constraint_that_fails_ends_its_sequence() -> None:
    class Broken:
        def mask(self) -> range:
            return range(50)

        def advance(self, token_id: int) -> None:
            raise ValueError

    bench = Bench()
    one = bench.add(work(1, [1, 2], 9))
    one.constraint = Broken()
    bench.step()
    assert (bench.answer(one).finish, bench.answer(one).tokens) == (FinishReason.ERROR, [])


Damage = Callable[[Bench, Sequence], object]


@pytest.mark.parametrize(
    "damage",
    [
        lambda bench, s: bench.scheduler.waiting.append(s),
        lambda bench, s: bench.scheduler.running.reverse(),
        lambda bench, s: s.block_table.pop(),
        lambda bench, s: setattr(s, "num_computed", 99),
        lambda bench, s: bench.pool.allocate(1, "nobody"),
    ],
)
def test_the_integrity_check_sees_damage(damage: Damage) -> None:
    bench = Bench()
    one = bench.add(work(1, range(9), 9))
    bench.add(work(2, range(20, 24), 9))
    bench.step()
    damage(bench, one)
    with pytest.raises(AssertionError):
        bench.scheduler.check_integrity()
