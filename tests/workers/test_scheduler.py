"""The scheduler alone: blocks of 4 tokens, exact plans, no runner but a function of the plan."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.workers.scheduler_bench import Bench, shape
from tests.workers.toy_engine import BLOCK_SIZE, toy_answer, work
from workers.plan import StepOutput
from workers.prefix import PrefixHasher
from workers.scheduler import MAX_OVERTAKES
from workers.sequence import Sequence
from workers.types import FinishReason, TokenDelta, TokenLogprobs


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
    assert bench.scheduler.num_computed_tokens == 12
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


def test_who_ends_while_a_step_is_in_flight_is_passed_over() -> None:
    bench = Bench()
    one = bench.add(work(1, [1, 2], 9))
    two = bench.add(work(2, [3, 4], 1))
    plan = bench.plan()
    ticket = bench.runner.launch(plan)
    bench.scheduler.end(one, FinishReason.CANCELLED, 0.0)
    bench.scheduler.commit(plan, ticket.output(), 0.0)
    bench.check()
    assert bench.answer(one).tokens == []
    assert bench.answer(two).tokens == toy_answer(two.work)
    assert bench.scheduler.num_computed_tokens == 4


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


class Guess:
    """Guesses one token right and another wrong."""

    def __init__(self, right: int) -> None:
        self.right = right

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        return [self.right, (self.right + 1) % 50, 0][: min(limit, 2)]


def test_a_draft_brings_what_was_guessed_right_and_one_token_more() -> None:
    bench = Bench()
    one = bench.add(work(1, range(6), 4))
    whole = toy_answer(one.work)
    one.proposer = Guess(whole[0])
    plan = bench.step()
    assert plan.chunks[0].draft == (whole[0], (whole[0] + 1) % 50)
    assert bench.answer(one).tokens == whole[:2]
    assert (one.num_computed, len(one.block_table)) == (7, 2)
    assert (bench.scheduler.num_drafted_tokens, bench.scheduler.num_accepted_tokens) == (2, 1)
    bench.run()
    assert bench.answer(one).tokens == whole


def commit_tokens(*commits: tuple[int, ...]) -> tuple[Bench, Sequence, list[TokenDelta]]:
    """Run a prompt of 7 tokens whose runner brings these tokens, step by step."""
    bench = Bench(chunk_tokens=16)
    sequence = bench.add(work(1, range(7), 6, stop_token_ids=frozenset({99})))
    deltas = []
    for tokens in commits:
        plan = bench.plan()
        logprobs = tuple(TokenLogprobs(-float(token)) for token in tokens)
        bench.scheduler.commit(plan, StepOutput([tokens], [logprobs]), 0.0)
        bench.scheduler.check_integrity()
        deltas += bench.scheduler.drain_deltas()
    return bench, sequence, deltas


def test_a_step_may_bring_several_tokens() -> None:
    bench, sequence, deltas = commit_tokens((11, 12, 13), (14,))
    assert [d.token_ids for d in deltas] == [(11, 12, 13), (14,)]
    assert [p.logprob for p in deltas[0].logprobs] == [-11.0, -12.0, -13.0]
    assert sequence.num_computed == 10
    assert shape(bench.plan()) == [(1, 10, 1, True)]


@pytest.mark.parametrize(
    ("brought", "kept", "reason"),
    [((11, 99, 13), (11, 99), FinishReason.STOP), ((1, 2, 3, 4, 5, 6, 7), (1, 2, 3, 4, 5, 6), FinishReason.LENGTH)],
)
def test_what_comes_after_the_end_is_rolled_back(
    brought: tuple[int, ...], kept: tuple[int, ...], reason: FinishReason
) -> None:
    bench, _, deltas = commit_tokens(brought)
    assert deltas[0].token_ids == kept
    assert len(deltas[0].logprobs) == len(kept)
    assert deltas[0].finish is not None
    assert deltas[0].finish.reason is reason
    assert bench.pool.num_free == 64


def test_a_step_that_takes_its_token_back_draws_it_again() -> None:
    """Also where the last token completed a block: what is findable is not written again, but copied."""
    bench, sequence, deltas = commit_tokens((), (11,), ())
    assert [d.token_ids for d in deltas] == [(11,)]
    assert sequence.num_computed == 7
    plan = bench.plan()
    assert shape(plan) == [(1, 7, 1, True)]


def test_a_findable_block_that_is_computed_again_is_copied_first() -> None:
    bench, sequence, _ = commit_tokens((11,), (12,))
    sequence.start(7)
    plan = bench.plan()
    assert shape(plan) == [(1, 7, 2, True)]
    assert len(plan.copies) == 1
    assert plan.copies[0][1] == sequence.block_table[1]


def test_without_a_block_for_the_copy_the_sequence_gives_way() -> None:
    bench, sequence, _ = commit_tokens((11,), (12,))
    sequence.start(7)
    bench.pool.acquire(sequence.block_table[1:2])
    sequence.block_table += bench.pool.allocate(1, sequence) or []
    bench.pool.allocate(bench.pool.num_free, "somebody else")
    assert bench.scheduler.schedule(0.0).chunks == ()
    assert bench.scheduler.waiting == [sequence]


def test_received_tokens_are_part_of_the_answer() -> None:
    whole = toy_answer(work(1, [1, 2, 3], 8))
    bench = Bench()
    one = bench.add(work(1, [1, 2, 3], 8, received=[whole[:5]]))
    bench.run()
    assert bench.answer(one).tokens == whole[5:]


class KnowAll:
    """Guesses the rest of a text, but for every n-th token."""

    def __init__(self, text: list[int], errs_every: int) -> None:
        self.text = [token + (i % errs_every == 0) for i, token in enumerate(text)]

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        return self.text[len(tokens) :][:limit]


class SchedulerMachine(RuleBasedStateMachine):
    """Random works, steps, aborts and deadlines in a pool of 8 blocks; every answer is a prefix of the undisturbed one.

    Prompts are made of two tokens, so that prefixes collide, and every invariant is checked after every operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(8, chunk_tokens=6, max_num_sequences=4)
        self.sequences: list[Sequence] = []

    @rule(
        length=st.integers(1, 17),
        seed=st.integers(0, 3),
        max_tokens=st.integers(1, 15),
        priority=st.integers(-1, 1),
        patience=st.sampled_from([None, None, 1.0, 5.0]),
        num_received=st.integers(0, 3),
        errs_every=st.sampled_from([None, 1, 3]),
    )
    def add(
        self,
        length: int,
        seed: int,
        max_tokens: int,
        priority: int,
        patience: float | None,
        num_received: int,
        errs_every: int | None,
    ) -> None:
        prompt = [int(i >= length - seed) for i in range(length)]
        whole = toy_answer(work(0, prompt, max_tokens))
        task = work(
            len(self.sequences),
            prompt,
            max_tokens,
            priority=priority,
            received=[whole[: min(num_received, max_tokens - 1)]],
            deadline=None if patience is None else self.bench.now + patience,
        )
        self.sequences.append(self.bench.add(task))
        if errs_every is not None:
            self.sequences[-1].proposer = KnowAll([*prompt, *whole], errs_every)

    @rule()
    def step(self) -> None:
        self.bench.now += 0.25
        is_waiting = bool(self.bench.scheduler.waiting or self.bench.scheduler.running)
        plan = self.bench.step()
        left = self.bench.scheduler.waiting or self.bench.scheduler.running
        assert plan.chunks or not is_waiting or not left, "work is there and none is done"

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.bench.scheduler.end(sequence, FinishReason.CANCELLED, self.bench.now)

    @invariant()
    def holds_together(self) -> None:
        self.bench.check()

    def teardown(self) -> None:
        self.bench.run()
        assert self.bench.pool.num_free == 8
        for sequence in self.sequences:
            answer, whole = self.bench.answer(sequence), toy_answer(sequence.work)
            assert answer.finish is not None
            assert answer.tokens == whole[: len(answer.tokens)]
            assert answer.finish is not FinishReason.LENGTH or answer.tokens == whole


SchedulerMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedulerMachine = SchedulerMachine.TestCase

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
