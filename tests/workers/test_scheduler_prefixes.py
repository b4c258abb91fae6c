"""The scheduler and what prompts begin with: blocks of 4 tokens, found, shared while they are computed, copied."""

from __future__ import annotations

import pytest

from tests.workers.scheduler_bench import Bench, shape
from tests.workers.toy_engine import BLOCK_SIZE, toy_answer, work
from workers.prefix import PrefixHasher
from workers.types import FinishReason


def test_a_cached_prefix_is_not_computed_again() -> None:
    bench = Bench(chunk_tokens=32)
    bench.add(work(1, range(10), 1))
    bench.run()
    two = bench.add(work(2, [*range(9), 40, 41], 1))
    assert shape(bench.step()) == [(2, 8, 3, True)]
    assert bench.answer(two).num_cached_tokens == 8
    assert (bench.scheduler.prefix_cache_hits, bench.scheduler.prefix_cache_queries) == (8, 21)


def test_another_salt_or_adapter_shares_nothing() -> None:
    bench = Bench(chunk_tokens=32)
    bench.add(work(1, range(8), 1))
    bench.run()
    salted = bench.add(work(2, range(8), 1, salt=b"tenant"))
    adapted = bench.add(work(3, range(8), 1, adapter="style"))
    bench.run()
    assert bench.answer(salted).num_cached_tokens == bench.answer(adapted).num_cached_tokens == 0


def test_without_prefix_cache_nothing_is_named() -> None:
    bench = Bench(chunk_tokens=32, prefix_cache=False)
    for number in range(2):
        bench.add(work(number, range(9), 2))
    assert bench.step().num_tokens == 18
    bench.run()
    assert bench.pool.resident_hashes() == set()


def test_generated_tokens_are_cached_too() -> None:
    bench = Bench(chunk_tokens=32)
    one = bench.add(work(1, [1, 2, 3], 6))
    bench.run()
    two = bench.add(work(2, [1, 2, 3, *bench.answer(one).tokens], 1))
    bench.run()
    assert bench.answer(two).num_cached_tokens == 8


def test_a_wholly_cached_prompt_computes_its_last_token_in_a_copy() -> None:
    bench = Bench(chunk_tokens=32)
    bench.add(work(1, range(8), 1))
    bench.run()
    two = bench.add(work(2, range(8), 6))
    plan = bench.plan()
    assert shape(plan) == [(2, 7, 1, True)]
    ((source, target),) = plan.copies
    assert two.block_table[1] == target != source
    bench.commit(plan)
    assert bench.answer(two).num_cached_tokens == 7
    bench.run()
    assert bench.answer(two).tokens == toy_answer(two.work)


def test_a_wholly_cached_prompt_in_a_full_pool_takes_its_own_block_back() -> None:
    bench = Bench(2, chunk_tokens=32)
    bench.add(work(1, range(8), 1))
    bench.run()
    two = bench.add(work(2, range(8), 1))
    plan = bench.step()
    assert (shape(plan), plan.copies) == ([(2, 7, 1, True)], ())
    assert bench.answer(two).tokens == toy_answer(two.work)


def test_a_wholly_cached_prompt_that_others_hold_waits_for_a_block() -> None:
    bench = Bench(3, chunk_tokens=32)
    one = bench.add(work(1, range(8), 4))
    bench.step()
    two = bench.add(work(2, range(8), 4))
    while not bench.answer(one).finish:
        bench.step()
        assert two in bench.scheduler.waiting
    bench.run()
    assert bench.answer(two).tokens == toy_answer(two.work)


def test_equal_prompts_that_arrive_together_are_computed_once() -> None:
    """Sixteen requests with one new prefix: 32 shared tokens, then 3 of their own."""
    bench = Bench(chunk_tokens=16, max_num_sequences=16)
    sequences = [bench.add(work(n, [*range(32), 40 + n // 8, n % 8, 9], 1)) for n in range(16)]
    bench.run()
    assert bench.runner.num_rows == 32 + 16 * 3
    assert [bench.answer(s).tokens for s in sequences] == [toy_answer(s.work) for s in sequences]


def test_who_waits_for_a_pending_block_lets_others_pass() -> None:
    bench = Bench(chunk_tokens=16)
    bench.add(work(1, range(12), 1))
    bench.add(work(2, range(12), 1))
    bench.add(work(3, [30, 31], 1))
    assert shape(bench.step()) == [(1, 0, 12, True), (3, 0, 2, True)]
    assert shape(bench.step()) == [(2, 11, 1, True)]


@pytest.mark.parametrize("how", ["aborted", "expired"])
def test_when_a_filler_goes_its_followers_compute_for_themselves(how: str) -> None:
    bench = Bench(chunk_tokens=4)
    one = bench.add(work(1, range(12), 1, deadline=5.0))
    two = bench.add(work(2, range(12), 1))
    bench.step()
    if how == "aborted":
        bench.scheduler.end(one, FinishReason.CANCELLED, bench.now)
        bench.scheduler.end(one, FinishReason.CANCELLED, bench.now)
    else:
        bench.now = 5.0
    assert shape(bench.step()) == [(2, 4, 4, False)]
    bench.run()
    assert bench.answer(one).finish in (FinishReason.CANCELLED, FinishReason.DEADLINE)
    assert bench.answer(two).tokens == toy_answer(two.work)


def test_a_toy_filler_of_blocks_needs_nothing_from_the_scheduler() -> None:
    """Somebody else (a copy from another replica, say) brings the first block of a prompt; it is waited for."""
    bench = Bench(chunk_tokens=16)
    prompt = list(range(10))
    sequence = bench.add(work(1, prompt, 2))
    (name, _) = sequence.block_hashes(PrefixHasher(b"test", BLOCK_SIZE))
    (block,) = bench.pool.allocate(1, "toy filler") or ()
    bench.pool.promise(block, name)
    assert bench.scheduler.schedule(0.0).chunks == ()
    bench.runner.cache[block] = list(prompt[:4])
    bench.pool.fill(block, name)
    bench.pool.release([block])
    assert shape(bench.step()) == [(1, 4, 6, True)]
    bench.run()
    assert bench.answer(sequence).tokens == toy_answer(sequence.work)
    assert bench.answer(sequence).num_cached_tokens == 4


def test_what_another_sequence_computes_or_has_computed_is_owed_once() -> None:
    """A burst with one prefix looked like so many prefills, and the router sent its second half elsewhere."""
    bench = Bench(chunk_tokens=8)
    shared = list(range(10, 26))
    burst = [bench.add(work(number, [*shared, number], 2)) for number in range(1, 5)]
    assert bench.scheduler.owed_prefill_tokens == 17 + 3
    bench.step()
    assert bench.scheduler.owed_prefill_tokens == 9 + 3
    bench.scheduler.end(burst[0], FinishReason.CANCELLED, 0.0)
    for _ in range(8):
        bench.step()
    assert bench.scheduler.owed_prefill_tokens == 0
    bench.add(work(9, [*shared, 9], 2))
    assert bench.scheduler.owed_prefill_tokens == 1
