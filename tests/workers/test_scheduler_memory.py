"""The scheduler out of blocks: who is preempted, who waits, who is passed, and what `reserve` spares."""

from __future__ import annotations

from tests.workers.scheduler_bench import Bench, shape
from tests.workers.toy_engine import toy_answer, work
from workers.scheduler import MAX_OVERTAKES
from workers.sequence import Sequence


def test_out_of_blocks_the_last_rank_is_preempted_and_recomputed() -> None:
    bench = Bench(6, chunk_tokens=32)
    first = bench.add(work(1, [1, 2, 3, 4], 12))
    second = bench.add(work(2, [5, 6, 7, 8], 12, priority=-1))
    bench.step()
    third = bench.add(work(3, [9, 10, 11, 12], 12))
    bench.run()
    assert [s.num_preemptions for s in (first, second, third)] != [0, 0, 0]
    assert second.num_preemptions == 0, "the highest priority is never the victim"
    for sequence in (first, second, third):
        answer = bench.answer(sequence)
        assert answer.tokens == toy_answer(sequence.work)
        assert answer.last is not None
        assert answer.last.finish is not None
        assert answer.last.finish.num_preemptions == sequence.num_preemptions
    assert bench.scheduler.num_preemptions == first.num_preemptions + third.num_preemptions


def test_a_sequence_alone_is_never_preempted() -> None:
    bench = Bench(4, chunk_tokens=32)
    one = bench.add(work(1, range(8), 9))
    bench.run()
    assert (one.num_preemptions, bench.answer(one).tokens) == (0, toy_answer(one.work))


def test_who_finds_no_block_and_no_victim_gives_way_itself() -> None:
    bench = Bench(4, chunk_tokens=32)
    held = bench.pool.allocate(2, "somebody else") or []
    one = bench.add(work(1, range(8), 4))
    plan = bench.scheduler.schedule(0.0)
    bench.scheduler.commit(plan, bench.runner.launch(plan).output(), 0.0)
    assert bench.scheduler.schedule(0.0).chunks == ()
    assert (one.num_preemptions, bench.scheduler.waiting) == (1, [one])
    assert bench.scheduler.is_short_of_blocks
    bench.pool.release(held)
    bench.run()
    assert bench.answer(one).tokens == toy_answer(one.work)


def test_with_reserve_a_sequence_waits_until_its_longest_answer_fits_and_nothing_is_preempted() -> None:
    """Prompt 4 + answer 12 - 1 tokens are 4 blocks of 4: two of the three fit into 9."""
    works = [work(n, [n * 4 + i for i in range(4)], 12) for n in range(3)]
    thrifty, safe = Bench(9, chunk_tokens=32), Bench(9, chunk_tokens=32, reserve=True)
    for bench in (thrifty, safe):
        sequences = [bench.add(one) for one in works]
        bench.step()
        assert len(bench.scheduler.running) == (2 if bench is safe else 3)
        assert bench.pool.num_free == (1 if bench is safe else 6)
        bench.run()
        assert [bench.answer(s).tokens for s in sequences] == [toy_answer(one) for one in works]
    assert thrifty.scheduler.num_preemptions > 0
    assert safe.scheduler.num_preemptions == 0


def test_with_reserve_cached_blocks_count_and_short_answers_give_theirs_back() -> None:
    whole = toy_answer(work(1, range(8), 9))
    bench = Bench(5, chunk_tokens=32, reserve=True)
    bench.add(work(1, range(8), 1))
    bench.run()
    two = bench.add(work(2, [*range(8), 40], 4, stop_token_ids=frozenset({whole[0]})))
    plan = bench.step()
    assert (shape(plan), len(two.block_table)) == ([(2, 8, 1, True)], 3)
    three = bench.add(work(3, range(8), 5))
    bench.run()
    assert bench.pool.num_free == 5
    assert bench.answer(three).tokens == toy_answer(three.work)


def test_with_reserve_a_block_for_a_copy_is_waited_for() -> None:
    """A token that is drawn again lies in a block that another sequence has found; nobody is preempted for the copy."""
    bench = Bench(5, chunk_tokens=16, reserve=True)
    one = bench.add(work(1, range(8), 5))
    bench.step()
    two = bench.add(work(2, [*range(8), 40], 4))
    bench.step()
    assert two.block_table[:2] == one.block_table[:2]
    one.start(7)
    assert bench.pool.num_free == 1
    held = bench.pool.allocate(1, "somebody else") or []
    assert [c.sequence for c in bench.scheduler.schedule(0.0).chunks] == [two]
    bench.pool.release(held)
    plan = bench.scheduler.schedule(0.0)
    assert {c.sequence: c.start for c in plan.chunks} == {one: 7, two: 10}
    assert [target for _, target in plan.copies] == one.block_table[1:2]
    assert bench.scheduler.num_preemptions == 0


def test_what_can_never_fit_is_said_with_its_numbers() -> None:
    bench = Bench(4)
    assert bench.scheduler.refusal(Sequence(work(1, range(8), 9))) is None
    assert bench.scheduler.refusal(Sequence(work(1, range(8), 10))) == (
        "prompt (8 tokens) + max_tokens (10) needs 5 KV blocks of 4 tokens, the engine has 4"
    )


def test_a_large_sequence_without_blocks_is_passed_but_not_for_ever() -> None:
    bench = Bench(64, chunk_tokens=256)
    bench.add(work(1, range(8), 100))
    bench.step()
    large = bench.add(work(2, range(1_000, 1_248), 1))
    small = []
    while not large.is_ended:
        small.append(bench.add(work(3 + len(small), [len(small) % 50], 5)))
        bench.now += 1.0
        bench.step()
        assert len(small) < 150
    assert large.num_overtaken == MAX_OVERTAKES
    assert large.started_at is not None
    assert sum((s.started_at or bench.now) < large.started_at for s in small) == MAX_OVERTAKES
    bench.run()
    assert bench.answer(large).tokens == toy_answer(large.work)


def test_a_sequence_whose_step_is_in_flight_is_not_preempted() -> None:
    """Three blocks: one for each, and one that the first takes for its fifth token while both are in flight."""
    bench = Bench(3)
    first = bench.add(work(1, [1, 2, 3, 4], 9, priority=-1))
    last = bench.add(work(2, [5, 6, 7], 6))
    plans = [bench.scheduler.schedule(0.0) for _ in range(5)]
    assert [shape(plan) for plan in plans[1:]] == [
        [(1, 4, 1, True), (2, 3, 1, True)],
        *([(1, position, 1, True)] for position in (5, 6, 7)),
    ]
    assert shape(bench.scheduler.schedule(0.0)) == [], "the first lacks a block, and what the last has is in flight"
    for plan in plans:
        bench.scheduler.commit(plan, bench.runner.launch(plan).output(), 0.0)
    bench.check()
    assert shape(bench.step()) == [(1, 8, 1, True)]
    assert (first.num_preemptions, last.num_preemptions) == (0, 1)
    bench.run()
    assert [bench.answer(s).tokens for s in (first, last)] == [toy_answer(s.work) for s in (first, last)]
