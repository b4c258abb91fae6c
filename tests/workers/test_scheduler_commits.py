"""What a step brings to the scheduler: several tokens, none, guesses, more than the answer, one of who has ended."""

from __future__ import annotations

import random
from collections import deque

import pytest

from tests.workers.scheduler_bench import Bench, shape
from tests.workers.toy_engine import toy_answer, toy_token, work
from workers.plan import StepOutput, StepPlan
from workers.sequence import Sequence
from workers.types import FinishReason, TokenDelta, TokenLogprobs


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
    assert bench.scheduler.commits.num_computed_tokens == 4


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
    assert (bench.scheduler.commits.num_drafted_tokens, bench.scheduler.commits.num_accepted_tokens) == (2, 1)
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
        deltas += bench.scheduler.commits.drain()
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


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_what_was_planned_on_a_token_that_is_taken_back_is_void(lag: int) -> None:
    """Steps in flight went on from it; they come back, and count for nothing."""
    rng, bench = random.Random(lag), Bench(16, chunk_tokens=9, max_num_sequences=5)
    sequences = [bench.add(work(n, [n, *range(n)], 25)) for n in range(6)]
    known = {sequence: list(sequence.tokens) for sequence in sequences}
    in_flight: deque[tuple[StepPlan, StepOutput]] = deque()
    num_taken_back = 0
    while bench.scheduler.waiting or bench.scheduler.running:
        plan = bench.plan()
        tokens: list[tuple[int, ...]] = []
        for chunk in plan.chunks:
            end = chunk.start + chunk.num_tokens
            drawn = toy_token(known[chunk.sequence][:end], "", frozenset())
            is_taken_back = chunk.samples and rng.random() < 0.1
            num_taken_back += is_taken_back
            if chunk.samples:
                known[chunk.sequence][end:] = [drawn + is_taken_back]
            tokens.append((drawn,) if chunk.samples and not is_taken_back else ())
        in_flight.append((plan, StepOutput(tokens)))
        if len(in_flight) > lag or not plan.chunks:
            bench.scheduler.commit(*in_flight.popleft(), 0.0)
        bench.check()
    for plan, output in in_flight:
        bench.scheduler.commit(plan, output, 0.0)
    assert num_taken_back > 10
    assert bench.pool.num_free == 16
    for sequence in sequences:
        assert bench.answer(sequence).tokens == toy_answer(sequence.work)
