"""The paged engine, stepped by hand over the toy runner."""

from __future__ import annotations

from dataclasses import replace

import pytest
from octavo.names import Reason

from tests.workers.toy_engine import (
    VOCAB_SIZE,
    Answer,
    Clock,
    ToyEngine,
    ToyRunner,
    assert_idle,
    gather,
    toy_answer,
    toy_logprob,
    work,
)
from workers.engine import CHECK_INTERVAL_S
from workers.precedence import MAX_IDLE_STEPS
from workers.sequence import Sequence
from workers.types import FinishReason, GenerateWork, Load, PoolWork, SamplingParams, WorkId


def finish_of(answer: Answer) -> tuple[FinishReason, str, str]:
    assert answer.last is not None
    assert answer.last.finish is not None
    return answer.last.finish.reason, answer.last.finish.error_reason, answer.last.finish.error_message


def only(answers: dict[WorkId, Answer]) -> Answer:
    (answer,) = answers.values()
    return answer


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("num_blocks", [12, 64])
def test_every_way_to_run_gives_the_same_tokens(
    num_blocks: int, chunk_tokens: int, prefix_cache: bool, lag: int
) -> None:
    """Cold, then warm; with preemptions in the small pool; read at once or one step behind."""
    engine = ToyEngine(num_blocks, chunk_tokens=chunk_tokens, prefix_cache=prefix_cache, lag=lag)
    works = [work(n, [*range(11), n % 3][: 4 + n], 3 + 2 * n, stop_token_ids=frozenset({7})) for n in range(9)]
    num_cached = []
    for _ in range(2):
        for one in works:
            engine.submit(one)
        answers = engine.run()
        assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in works}
        num_cached.append(sum(a.num_cached_tokens or 0 for a in answers.values()))
    assert (num_cached[1] > 0) == prefix_cache
    if num_blocks == 12 and chunk_tokens == 64:
        assert engine.load().num_preemptions > 0


def test_a_lagging_engine_launches_a_step_before_it_has_read_the_last() -> None:
    engine = ToyEngine(lag=1)
    engine.submit(work(1, [1, 2], 3))
    assert engine.step_checked()
    assert (engine.runner.num_launches, engine.drain_outputs()) == (1, [])
    assert engine.step_checked()
    assert (engine.runner.num_launches, len(engine.drain_outputs())) == (2, 1)
    engine.run()
    assert engine.runner.num_launches == 3, "max_tokens is known beforehand: no step in vain"


@pytest.mark.parametrize("lag", [0, 1])
def test_with_reserve_nothing_is_preempted(lag: int) -> None:
    engine = ToyEngine(8, chunk_tokens=64, reserve=True, lag=lag)
    works = [work(n, [*range(11), n % 3][: 4 + n], 3 + 2 * n) for n in range(9)]
    for one in works:
        engine.submit(one)
    answers = engine.run()
    assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in works}
    assert engine.load().num_preemptions == 0


@pytest.mark.parametrize("num_blocks", range(6, 13))
def test_a_lagging_engine_never_preempts_who_goes_first(num_blocks: int) -> None:
    """It gave way itself when all others were in flight and no block was left."""
    engine = ToyEngine(num_blocks, chunk_tokens=8, lag=1)
    first = work(0, [9], 20, priority=-1)
    for one in [first, *(work(n, [n] * 3, 20) for n in range(1, 5))]:
        engine.submit(one)
    answers = engine.run()
    finish = answers[first.work_id].last
    assert finish is not None
    assert finish.finish is not None
    assert finish.finish.num_preemptions == 0
    assert answers[first.work_id].tokens == toy_answer(first)


def test_abort_frees_at_once_and_is_idempotent() -> None:
    engine = ToyEngine()
    engine.submit(work(1, range(20), 9))
    engine.submit(work(2, range(20), 9))
    engine.step_checked()
    for number in (1, 1, 2, 3):
        engine.abort(WorkId("r", number))
        engine.check_integrity()
    assert_idle(engine)
    answers = engine.run()
    assert {i.number: a.finish for i, a in answers.items()} == {1: FinishReason.CANCELLED, 2: FinishReason.CANCELLED}
    engine.abort(WorkId("r", 1))
    assert engine.drain_outputs() == []


@pytest.mark.parametrize("lag", [0, 1])
def test_an_aborted_step_in_flight_is_passed_over(lag: int) -> None:
    engine = ToyEngine(lag=lag)
    engine.submit(work(1, [1, 2], 9))
    engine.submit(work(2, [3, 4], 9))
    engine.step_checked()
    engine.abort(WorkId("r", 1))
    answers = engine.run()
    assert answers[WorkId("r", 2)].tokens == toy_answer(work(2, [3, 4], 9))
    assert answers[WorkId("r", 1)].finish is FinishReason.CANCELLED


def test_a_work_id_in_progress_is_taken_once() -> None:
    engine = ToyEngine()
    for _ in range(2):
        engine.submit(work(1, [1, 2], 3))
    assert only(engine.run()).tokens == toy_answer(work(1, [1, 2], 3))
    engine.submit(work(1, [1, 2], 3))
    assert only(engine.run()).finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (work(1, []), Reason.EMPTY_PROMPT, "prompt must have at least one token"),
        (
            work(1, range(90), 11),
            Reason.PROMPT_TOO_LONG,
            "prompt (90 tokens) + max_tokens (11) must be at most 100 tokens",
        ),
        (
            work(1, range(30), 4),
            Reason.PROMPT_TOO_LONG,
            "prompt (30 tokens) + max_tokens (4) needs 9 KV blocks of 4 tokens, the engine has 8",
        ),
        (
            PoolWork(work_id=WorkId("r", 1), tokens=[1]),
            Reason.ENGINE_CAPABILITY,
            "engine toy serves generate only",
        ),
    ],
)
def test_what_cannot_be_done_ends_with_its_reason(bad: GenerateWork, reason: str, message: str) -> None:
    engine = ToyEngine(8, max_model_len=100)
    engine.submit(bad)
    assert finish_of(only(engine.run())) == (FinishReason.ERROR, reason, message)
    assert engine.runner.num_launches == 0


@pytest.mark.parametrize(("received", "reason"), [([5, 9], FinishReason.STOP), ([5, 6, 7, 8], FinishReason.LENGTH)])
def test_an_answer_that_was_complete_before_a_resume_ends_at_once(received: list[int], reason: FinishReason) -> None:
    engine = ToyEngine()
    engine.submit(work(1, [1, 2], 4, received=[received], stop_token_ids=frozenset({9})))
    answer = only(engine.run())
    assert (answer.finish, answer.tokens, engine.runner.num_launches) == (reason, [], 0)


def test_choices_of_one_work_share_its_prompt_and_differ_in_their_seed() -> None:
    engine = ToyEngine(chunk_tokens=64)
    one = work(1, range(10), 3, n=3, sampling=SamplingParams(seed=2**64 - 1))
    engine.submit(one)
    engine.step_checked()
    (sequence,) = engine._scheduler.running
    assert sequence.sampling.seed == 2**64 - 1
    engine.step_checked()
    assert [s.sampling.seed for s in engine._scheduler.running] == [2**64 - 1, 0, 1]
    while engine.step_checked():
        pass
    deltas = engine.drain_outputs()
    for index in range(3):
        answers: dict[WorkId, Answer] = {}
        gather(deltas, answers, index)
        answer = only(answers)
        assert answer.tokens == toy_answer(one)
        assert answer.num_cached_tokens == (0 if index == 0 else None)
    assert engine.load().num_computed_tokens == 10 + 2 * 1 + 3 * 2, "the others compute the last prompt token only"
    assert_idle(engine)


def choices(engine: ToyEngine, num_choices: int) -> list[Answer]:
    """Run the engine, which has one work, and return the answers of its choices."""
    while engine.step_checked():
        pass
    deltas = engine.drain_outputs()
    assert_idle(engine)
    found = []
    for index in range(num_choices):
        answers: dict[WorkId, Answer] = {}
        gather(deltas, answers, index)
        found.append(only(answers))
    return found


class SeededRunner(ToyRunner):
    """Draws by the seed too, so that choices differ."""

    def draw(self, sequence: Sequence, tokens: list[int]) -> int:
        return super().draw(sequence, [*tokens, sequence.sampling.seed])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [14, 64])
@pytest.mark.parametrize("num_prompt_tokens", [1, 3, 8, 11])
def test_choices_run_on_one_copy_of_their_prompt(
    num_prompt_tokens: int, num_blocks: int, prefix_cache: bool, lag: int
) -> None:
    """Also where the prompt ends within a block, without a prefix cache, and with preemptions in the small pool."""
    engine = ToyEngine(num_blocks, prefix_cache=prefix_cache, lag=lag, runner=SeededRunner(num_blocks))
    one = work(1, range(num_prompt_tokens), 13, n=4, sampling=SamplingParams(seed=5))
    engine.submit(one)
    answers = choices(engine, 4)
    assert len({tuple(a.tokens) for a in answers}) == 4
    for index, answer in enumerate(answers):
        alone = ToyEngine(64, runner=SeededRunner(64))
        alone.submit(work(1, one.prompt, 13, sampling=SamplingParams(seed=5 + index)))
        assert answer.tokens == only(alone.run()).tokens
    if num_blocks == 64:
        assert engine.runner.num_rows == num_prompt_tokens + 3 + 4 * 12
        assert engine.load().num_preemptions == 0
    elif num_prompt_tokens > 3:
        assert engine.load().num_preemptions > 0


def test_choices_whose_leader_has_ended_compute_for_themselves() -> None:
    engine = ToyEngine(prefix_cache=False)
    engine.submit(work(1, range(6), 1, n=2))
    assert [a.tokens for a in choices(engine, 2)] == [toy_answer(work(1, range(6), 1))] * 2
    assert engine.runner.num_rows == 12


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [14, 64])
@pytest.mark.parametrize("cuts", [(3, 0, 7, 1), (0, 5, 5, 12), (13, 2, 0, 4)])
def test_choices_go_on_each_after_its_own_tokens(
    cuts: tuple[int, ...], num_blocks: int, prefix_cache: bool, lag: int
) -> None:
    """Token for token as if they had not been interrupted; one of them may be complete. The prompt's full blocks are
    computed once, where there is a cache for them."""
    one = work(1, range(9), 13, n=4, sampling=SamplingParams(seed=5))
    undisturbed = ToyEngine(64, runner=SeededRunner(64))
    undisturbed.submit(one)
    whole = [answer.tokens for answer in choices(undisturbed, 4)]
    engine = ToyEngine(num_blocks, prefix_cache=prefix_cache, lag=lag, runner=SeededRunner(num_blocks))
    received = [tokens[:cut] for tokens, cut in zip(whole, cuts, strict=True)]
    engine.submit(replace(one, received=received))
    answers = choices(engine, 4)
    assert [[*had, *answer.tokens] for had, answer in zip(received, answers, strict=True)] == whole
    assert {answer.finish for answer in answers} == {FinishReason.LENGTH}
    if num_blocks == 64 and not lag:
        num_live = sum(cut < 13 for cut in cuts)
        num_shared = 8 * (num_live - 1) if prefix_cache else 0
        assert engine.runner.num_rows == num_live * (9 + 12) - num_shared


def test_choices_of_a_poison_work_all_fail() -> None:
    engine = ToyEngine(poison=666)
    engine.submit(work(1, [1, 666], 5, n=3))
    assert {finish_of(a)[0] for a in choices(engine, 3)} == {FinishReason.ERROR}


def test_a_leader_goes_as_early_as_a_choice_that_is_due() -> None:
    engine = ToyEngine()
    engine.submit(work(1, range(6), 2, priority=9, n=2))
    leader, other = engine._scheduler.waiting
    other.num_idle_steps = MAX_IDLE_STEPS
    leader.num_idle_steps = -1_000
    engine.submit(work(2, range(20, 36), 2))
    engine.step_checked()
    assert leader.num_computed == 6
    answers = engine.run()
    assert answers[WorkId("r", 1)].tokens == toy_answer(work(1, range(6), 2))


@pytest.mark.parametrize("lag", [0, 1])
def test_min_tokens_hold_stop_tokens_back(lag: int) -> None:
    whole = toy_answer(work(1, [1, 2], 9))
    stops = frozenset(whole[:3])
    one = work(1, [1, 2], 9, min_tokens=4, stop_token_ids=stops)
    for received in ([], [whole[0]], toy_answer(one)[:3]):
        task = work(1, [1, 2], 9, min_tokens=4, stop_token_ids=stops, received=[received])
        engine = ToyEngine(lag=lag)
        engine.submit(task)
        answer = [*received, *only(engine.run()).tokens]
        assert answer == [*received, *toy_answer(task)]
        assert len(answer) > 4
        assert not stops & set(answer[len(received) : 4])


def test_log_probabilities_go_with_their_tokens() -> None:
    engine = ToyEngine(64, chunk_tokens=64)
    engine.submit(work(1, [1, 2], 5, num_logprobs=2))
    engine.submit(work(2, [3, 4], 5))
    engine.submit(work(3, [5, 6], 5, num_logprobs=0))
    while engine.step_checked():
        for delta in engine.drain_outputs():
            count = {1: 2, 2: None, 3: 0}[delta.work_id.number]
            if count is None:
                assert delta.logprobs == ()
            else:
                assert [p.logprob for p in delta.logprobs] == [toy_logprob(t) for t in delta.token_ids]
                assert all(len(p.top) == count for p in delta.logprobs)


class EvenOnly:
    """A toy constraint: even tokens, and each one at most once."""

    def __init__(self) -> None:
        self.allowed = list(range(0, VOCAB_SIZE, 2))

    def mask(self) -> list[int]:
        return self.allowed

    def advance(self, token_id: int) -> None:
        self.allowed.remove(token_id)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("cut", [0, 4])
def test_a_toy_constraint_holds_through_preemption_and_resume(lag: int, cut: int) -> None:
    def run(num_blocks: int, received: list[int]) -> list[list[int]]:
        engine = ToyEngine(num_blocks, lag=lag, constraint_for=lambda work: EvenOnly())
        works = [work(n, [n, 1, 2], 12, received=[received] if n == 0 else ()) for n in range(3)]
        for one in works:
            engine.submit(one)
        answers = engine.run()
        assert (engine.load().num_preemptions > 0) == (num_blocks == 8)
        return [answers[one.work_id].tokens for one in works]

    whole = run(64, [])
    assert all(len(set(tokens)) == 12 for tokens in whole)
    assert not any(token % 2 for tokens in whole for token in tokens)
    resumed = run(8, whole[0][:cut])
    assert resumed == [whole[0][cut:], *whole[1:]]


def test_a_constraint_that_fails_ends_its_own_work_only() -> None:
    class Impossible(EvenOnly):
        def advance(self, token_id: int) -> None:
            super().advance(token_id)
            if len(self.allowed) < VOCAB_SIZE // 2 - 2:
                raise ValueError("nothing fits")

    engine = ToyEngine(constraint_for=lambda work: Impossible() if work.work_id.number == 1 else None)
    engine.submit(work(1, [1, 2], 9))
    engine.submit(work(2, [1, 2], 9))
    answers = engine.run()
    assert finish_of(answers[WorkId("r", 1)]) == (
        FinishReason.ERROR,
        Reason.INTERNAL,
        "the constraint of this request failed (ValueError)",
    )
    assert len(answers[WorkId("r", 1)].tokens) == 2, "the token that it refused is no part of the answer"
    assert answers[WorkId("r", 2)].tokens == toy_answer(work(2, [1, 2], 9))


def test_a_toy_adapter_changes_answers_and_shares_no_blocks() -> None:
    engine = ToyEngine()
    plain, styled = work(1, range(9)), work(2, range(9), adapter="style")
    engine.submit(plain)
    engine.submit(styled)
    answers = engine.run()
    assert answers[plain.work_id].tokens == toy_answer(plain)
    assert answers[styled.work_id].tokens == toy_answer(styled) != toy_answer(plain)
    assert answers[styled.work_id].num_cached_tokens == 0


@pytest.mark.parametrize("chunk_tokens", [8, 64])
def test_one_poison_work_fails_alone(chunk_tokens: int) -> None:
    """Also when a cached prompt is copied in the step that fails."""
    engine = ToyEngine(chunk_tokens=chunk_tokens, poison=666)
    engine.submit(work(0, range(8), 1))
    engine.run()
    good = [work(1, range(8), 6), work(3, [1, 2, 3], 6), work(4, [7] * 6, 6)]
    for one in [*good[:1], work(2, [5, 666, 5], 6), *good[1:]]:
        engine.submit(one)
    answers = engine.run()
    assert finish_of(answers.pop(WorkId("r", 2))) == (
        FinishReason.ERROR,
        Reason.INTERNAL,
        "the engine could not compute this request (PoisonError)",
    )
    assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in good}


def test_what_is_logged_of_a_failure_names_the_request(caplog: pytest.LogCaptureFixture) -> None:
    engine = ToyEngine(poison=666)
    engine.submit(work(1, [666], request_id="mine", traceparent="00-12-34-01"))
    engine.run()
    (record,) = caplog.records
    assert (record.__dict__["request_id"], record.__dict__["traceparent"]) == ("mine", "00-12-34-01")


def test_a_poison_work_alone_in_its_step_fails() -> None:
    engine = ToyEngine(poison=666)
    engine.submit(work(1, [666], 6))
    assert finish_of(only(engine.run()))[0] is FinishReason.ERROR
    engine.submit(work(2, [6], 6))
    assert only(engine.run()).tokens == toy_answer(work(2, [6], 6))


def test_with_steps_in_flight_a_failure_ends_what_was_in_them() -> None:
    engine = ToyEngine(poison=666, lag=1)
    engine.submit(work(1, [1, 2], 6))
    engine.step_checked()
    engine.submit(work(2, [666], 6))
    assert {finish_of(a)[0] for a in engine.run().values()} == {FinishReason.ERROR}
    engine.submit(work(3, [6], 6))
    assert only(engine.run()).tokens == toy_answer(work(3, [6], 6))


def test_load_and_credit() -> None:
    engine = ToyEngine(32, chunk_tokens=16, max_num_sequences=3)
    assert engine.load() == Load(num_blocks=32, num_free_blocks=32, credit_tokens=32, credit_sequences=4)
    engine.submit(work(1, range(20), 20))
    load = engine.load()
    assert (load.num_waiting, load.owed_prefill_tokens, load.credit_tokens) == (1, 20, 12)
    engine.step_checked()
    load = engine.load()
    assert (load.num_running, load.owed_prefill_tokens, load.credit_tokens, load.num_free_blocks) == (1, 4, 28, 27)
    engine.submit(work(2, range(100, 140), 20))
    assert engine.load().credit_tokens == 0, "more is owed than two steps hold"
    for _ in range(4):
        engine.step_checked()
    assert (engine.load().owed_prefill_tokens, engine.load().credit_tokens) == (0, 32)
    engine.submit(work(3, [1], 3))
    assert engine.load().credit_sequences == 1, "one may wait for the next place"
    engine.submit(work(5, [2], 3))
    assert (engine.load().credit_sequences, engine.load().credit_tokens) == (0, 0)
    engine.abort(WorkId("r", 5))
    engine.step_checked()
    engine.abort(WorkId("r", 3))
    engine.submit(work(4, range(200, 250), 3))
    engine.step_checked()
    load = engine.load()
    assert (load.num_waiting, load.credit_tokens) == (1, 0), "it waits for blocks"
    engine.run()
    load = engine.load()
    assert (load.num_free_blocks, load.credit_tokens) == (32, 32)
    assert (load.num_steps, load.num_computed_tokens) == (engine.runner.num_launches, engine.runner.num_rows)


def test_credit_counts_the_places_that_become_free_by_the_time_others_come() -> None:
    """A queue in the engine cannot be put in order any more, and a place that is empty for a step is lost."""
    engine = ToyEngine(64, chunk_tokens=16, max_num_sequences=4)
    for number in range(4):
        engine.submit(work(number, [number + 1], 4))
    places = []
    while engine.load().num_running + engine.load().num_waiting:
        places.append(engine.load().credit_sequences)
        engine.step_checked()
    assert places == [1, 1, 4, 4]
    assert engine.load().credit_sequences == 5


def test_close_ends_everything_once() -> None:
    engine = ToyEngine()
    engine.submit(work(1, [1], 9))
    engine.step_checked()
    engine.close()
    engine.close()
    engine.submit(work(2, [1], 9))
    engine.submit(work(3, [1], 9, n=2))
    assert engine.runner.is_closed
    endings = [(d.work_id.number, d.index, d.finish.reason) for d in engine.drain_outputs() if d.finish]
    cancelled = FinishReason.CANCELLED
    assert endings == [(1, 0, cancelled), (2, 0, cancelled), (3, 0, cancelled), (3, 1, cancelled)]
    assert engine.step() is False


def test_an_idle_engine_checks_itself() -> None:
    engine = ToyEngine()
    engine.submit(work(1, [1], 2))
    engine.run()
    engine._pool.allocate(1, "a leak")
    assert engine.step() is False, "not more often than it is worth"
    engine.clock.now += CHECK_INTERVAL_S
    with pytest.raises(AssertionError):
        engine.step()


def test_deadlines_are_kept_by_the_engines_clock() -> None:
    engine = ToyEngine()
    clock: Clock = engine.clock
    engine.submit(work(1, [1], 100, deadline=clock.now + 2.0))
    engine.step_checked()
    clock.now += 2.0
    answer = only(engine.run())
    assert (answer.finish, answer.tokens) == (FinishReason.DEADLINE, toy_answer(work(1, [1], 1)))
