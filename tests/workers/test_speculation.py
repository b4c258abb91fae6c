"""Drafts, right, wrong and half right: answers, blocks and events are those of the run without them."""

from __future__ import annotations

import random
from collections.abc import Sequence as Seq

import pytest

from tests.workers.scheduler_bench import Bench
from tests.workers.toy_engine import BLOCK_SIZE, ToyEngine, ToyRunner, assert_idle, toy_answer, work
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.fake import FakeEngine, fake_continuation, fake_manifest
from workers.plan import Proposer, StepPlan, Ticket, accepted, verifies_drafts
from workers.sequence import Sequence
from workers.types import FinishReason, GenerateWork, SamplingParams, WorkId


class Oracle:
    """Knows the answers, and errs where it is told to."""

    def __init__(self, works: Seq[GenerateWork], rng: random.Random, error_rate: float) -> None:
        self.texts = [[*w.prompt, *(w.received[0] if w.received else ()), *toy_answer(w)] for w in works]
        self.rng = rng
        self.error_rate = error_rate

    def propose(self, tokens: Seq[int], limit: int) -> list[int]:
        assert limit >= 1
        text = next(text for text in self.texts if text[: len(tokens)] == list(tokens))
        draft = text[len(tokens) : len(tokens) + min(limit, 7)]
        draft += [0] * (min(limit, 7) - len(draft))  # it does not see an end coming
        return [(t + 1) % 50 if self.rng.random() < self.error_rate else t for t in draft]


class GuessingEngine(ToyEngine):
    guesser: Proposer | None = None

    def _proposer(self) -> Proposer | None:
        return self.guesser


def some_works() -> list[GenerateWork]:
    plain = [work(n, [*range(11), n % 3][: 4 + n], 3 + 2 * n) for n in range(7)]
    stops = [
        work(10 + n, [n, 7], 15, stop_token_ids=frozenset(toy_answer(work(0, [n, 7], 15))[n::3]), min_tokens=n)
        for n in range(4)
    ]
    return [*plain, *stops]


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("error_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("num_blocks", "reserve"), [(12, False), (12, True), (80, False)])
def test_any_draft_gives_the_same_tokens(num_blocks: int, reserve: bool, error_rate: float, lag: int) -> None:
    works = some_works()
    engine = GuessingEngine(num_blocks, chunk_tokens=24, reserve=reserve, lag=lag)
    engine.guesser = Oracle(works, random.Random(1), error_rate)
    plain = ToyEngine(num_blocks, chunk_tokens=24, reserve=reserve, lag=lag)
    for one in works:
        engine.submit(one)
        plain.submit(one)
    answers, expected = engine.run(), plain.run()
    assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in works}
    assert {i: a.finish for i, a in answers.items()} == {i: a.finish for i, a in expected.items()}
    load = engine.load()
    assert load.num_drafted_tokens > 0
    assert load.num_computed_tokens == engine.runner.num_rows
    if error_rate == 1.0:
        assert load.num_accepted_tokens == 0
    if num_blocks == 80:
        assert engine.reader.resident == plain.reader.resident, "what was guessed wrong is never findable"
        if error_rate == 0.0:
            assert load.num_steps < plain.load().num_steps / 2


def test_choices_with_seeds_of_their_own_are_verified_by_them() -> None:
    class SeededRunner(ToyRunner):
        def draw(self, sequence: Sequence, tokens: list[int]) -> int:
            return (super().draw(sequence, tokens) + sequence.sampling.seed) % 3

    one = work(1, [1, 2, 1, 2, 0, 1], 30, n=3, sampling=SamplingParams(seed=4))
    answers = []
    for lookup_tokens in (0, 5):
        engine = ToyEngine(runner=SeededRunner(64), lookup_tokens=lookup_tokens)
        engine.submit(one)
        while engine.step_checked():
            pass
        deltas = engine.drain_outputs()
        answers.append([[t for d in deltas if d.index == i for t in d.token_ids] for i in range(3)])
        assert_idle(engine)
        assert (engine.load().num_accepted_tokens > 0) == (lookup_tokens > 0)
    assert answers[0] == answers[1]


def shape(plan: StepPlan) -> list[tuple[int, int, int, int]]:
    """Return (work, start, tokens, guesses) of each chunk."""
    return [(c.sequence.work.work_id.number, c.start, c.num_tokens, len(c.draft)) for c in plan.chunks]


def guessing(bench: Bench, one: GenerateWork, error_rate: float = 0.0) -> Sequence:
    sequence = bench.add(one)
    sequence.proposer = Oracle([one], random.Random(0), error_rate)
    return sequence


def test_drafts_are_bounded_by_max_tokens_and_by_what_the_budget_leaves() -> None:
    bench = Bench(chunk_tokens=8)
    guessing(bench, work(1, [1, 2], 12))
    assert shape(bench.step()) == [(1, 0, 2, 6)]
    bench.add(work(2, range(10, 14), 9))
    assert shape(bench.step()) == [(1, 8, 1, 3), (2, 0, 4, 0)]
    assert shape(bench.step()) == [(1, 12, 1, 0), (2, 4, 1, 0)], "known tokens go first, and one token is to come"
    bench.run()
    assert bench.answers[WorkId("r", 1)].tokens == toy_answer(work(1, [1, 2], 12))


def test_blocks_of_wrong_guesses_are_given_back_and_never_taken_from_others() -> None:
    bench = Bench(6, chunk_tokens=16)
    one = guessing(bench, work(1, [1, 2, 3], 12), error_rate=1.0)
    plan = bench.plan()
    assert (shape(plan), len(one.block_table)) == ([(1, 0, 3, 7)], 3)
    bench.commit(plan)
    assert (one.num_computed, len(one.block_table), bench.pool.num_free) == (3, 1, 5)
    bench.add(work(2, range(10, 22), 4))
    bench.step()
    plan = bench.step()
    assert shape(plan)[0] == (1, 4, 1, 3), "one free block for each that runs is left, so its own have to do"
    assert bench.scheduler.num_preemptions == 0


def test_accepted_guesses_fill_blocks_that_others_find() -> None:
    bench = Bench(chunk_tokens=16)
    one = guessing(bench, work(1, [1, 2, 3], 12))
    bench.step()
    assert one.num_computed == 10
    two = bench.add(work(2, [1, 2, 3, *bench.answer(one).tokens], 1))
    bench.step()
    assert bench.answer(two).num_cached_tokens == 2 * BLOCK_SIZE


def test_a_stop_token_within_an_accepted_draft_ends_the_answer_there() -> None:
    whole = toy_answer(work(1, [1, 2, 3], 12))
    one = work(1, [1, 2, 3], 12, stop_token_ids=frozenset({whole[4]}))
    bench = Bench(chunk_tokens=16)
    sequence = bench.add(one)
    sequence.proposer = Oracle([work(1, [1, 2, 3], 12)], random.Random(0), 0.0)
    bench.step()
    answer = bench.answer(sequence)
    assert (answer.tokens, answer.finish) == (whole[:5], FinishReason.STOP)
    assert bench.pool.num_free == 64
    stored = [1, 2, 3, *whole[:4]]
    assert bench.reader.resident == set(bench.hasher.blocks(bench.hasher.root(), stored)), "as without a draft"


def test_accepted_is_all_that_was_drawn_up_to_the_first_error() -> None:
    assert accepted((), (5,)) == (5,)
    assert accepted((5, 6), (5, 6, 7)) == (5, 6, 7)
    assert accepted((5, 6), (5, 9, 7)) == (5, 9)
    assert accepted((5, 6), (4, 6, 7)) == (4,)
    with pytest.raises(AssertionError):
        accepted((5,), (5,))


@pytest.mark.parametrize("lookup_tokens", [1, 8])
def test_the_fake_engine_verifies_prompt_lookup(lookup_tokens: int) -> None:
    """Of three words, so that some guesses are right."""
    config = EngineConfig(engine="fake", block_size=4, num_blocks=60, lookup_tokens=lookup_tokens)
    engine = FakeEngine(config, manifest=fake_manifest(vocab_size=3, eos_token_ids=()))
    works = [work(n, [n % 3, 1, 2] * 4, 40) for n in range(6)]
    for one in works:
        engine.submit(one)
    answers: dict[WorkId, list[int]] = {}
    while engine.step():
        engine.check_integrity()
        for delta in engine.drain_outputs():
            answers.setdefault(delta.work_id, []).extend(delta.token_ids)
    assert answers == {w.work_id: fake_continuation(w.prompt, 40, 3) for w in works}
    load = engine.load()
    assert 0 < load.num_accepted_tokens < load.num_drafted_tokens


def test_a_runner_that_does_not_verify_is_given_no_drafts() -> None:
    class Plain:
        def launch(self, plan: StepPlan) -> Ticket:
            raise NotImplementedError

        def close(self) -> None: ...

    assert not verifies_drafts(Plain())
    with pytest.raises(ConfigError, match=r"engine.lookup_tokens must be 0 with engine toy.*; is 4"):
        ToyEngine(runner=Plain(), lookup_tokens=4)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"engine.lookup_tokens must be in \[0, 64\], is 65"):
        EngineConfig(lookup_tokens=65).check()
