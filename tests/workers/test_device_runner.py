"""The host side of an accelerator, over a device that computes late: what it is told, and the same answers."""

from __future__ import annotations

import random

import pytest
from octavo.names import Reason

from tests.workers.fake_device import DeadDeviceError, FakeDevice, FakeTicket, device_engine
from tests.workers.test_engine import EvenOnly
from tests.workers.toy_engine import Answer, ToyEngine, assert_idle, gather, toy_answer, toy_logprob, work
from workers.device import DeviceStep
from workers.types import FinishReason, GenerateWork, SamplingParams, WorkId

GREEDY = SamplingParams(temperature=0.0)


def answers_of(engine: ToyEngine, works: list[GenerateWork]) -> dict[WorkId, Answer]:
    for one in works:
        engine.submit(one)
    return engine.run()


def greedy(number: int, prompt: object, max_tokens: int = 4, **options: object) -> GenerateWork:
    return work(number, prompt, max_tokens, sampling=GREEDY, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_blocks", [12, 64])
@pytest.mark.parametrize("chunk_tokens", [4, 64])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_an_engine_ahead_of_its_device_gives_the_same_tokens(
    num_blocks: int, chunk_tokens: int, prefix_cache: bool
) -> None:
    """Cold, then warm; with preemptions in the small pool."""
    device = FakeDevice(num_blocks)
    engine = device_engine(device, chunk_tokens=chunk_tokens, prefix_cache=prefix_cache)
    works = [greedy(n, [*range(11), n % 3][: 4 + n], 3 + 2 * n, stop_token_ids=frozenset({7})) for n in range(9)]
    for _ in range(2):
        answers = answers_of(engine, works)
        assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in works}
    if num_blocks == 12 and chunk_tokens == 64:
        assert engine.load().num_preemptions > 0


def test_a_steady_step_tells_the_device_nothing() -> None:
    device = FakeDevice(64)
    engine = device_engine(device)
    answers_of(engine, [greedy(n, [n + 1, 5], 14) for n in range(3)])
    decodes = [step for step in device.steps if step.is_decode]
    assert [len(step.slots) for step in decodes] == [4] * 13
    assert [step.goes_on for step in decodes] == [False] + [True] * 12
    assert not any(step.newcomers for step in decodes)
    assert [i for i, step in enumerate(decodes) if step.tables] == [2, 6, 10], "a block for each four tokens"
    assert [len(write.blocks) for write in decodes[2].tables] == [1, 1, 1]


def test_a_decode_step_is_padded_to_a_graph_and_a_large_one_is_not() -> None:
    device = FakeDevice(64)
    engine = device_engine(device, chunk_tokens=64)
    answers_of(engine, [greedy(n, [n + 1], 2 + n) for n in range(6)])
    assert [len(step.slots) for step in device.steps] == [6, 6, 5, 4, 4, 2, 1]
    assert [step.num_chunks for step in device.steps] == [6, 6, 5, 4, 3, 2, 1]


def test_the_engine_is_one_step_ahead() -> None:
    device = FakeDevice(64)
    engine = device_engine(device)
    engine.submit(greedy(1, [1, 2], 9))
    for number in range(1, 6):
        engine.step_checked()
        assert (len(device.steps), device.num_computed) == (number, number - 1)
    engine.run()


def test_a_stop_token_is_found_a_step_late_and_the_surplus_dropped() -> None:
    """The surplus token fills a block: it is not published, and the block is free at once."""
    whole = toy_answer(greedy(0, [1, 2], 12))
    index = 5
    stop = whole[index]
    assert whole.index(stop) == index
    device = FakeDevice(64)
    engine = device_engine(device)
    answers = answers_of(engine, [greedy(1, [1, 2], 12, stop_token_ids=frozenset({stop}))])
    answer = answers[WorkId("r", 1)]
    assert (answer.tokens, answer.finish) == (whole[: index + 1], FinishReason.STOP)
    assert device.num_computed == len(device.steps) == index + 2, "one step in vain"
    assert len(engine.reader.resident) == 1, "seven tokens had keys and values, eight with the surplus"


def test_who_is_aborted_in_flight_leaves_no_block() -> None:
    device = FakeDevice(8)
    engine = device_engine(device)
    engine.submit(greedy(1, range(20), 9))
    for _ in range(4):
        engine.step_checked()
    engine.abort(WorkId("r", 1))
    engine.check_integrity()
    other = greedy(2, range(30, 44), 9)
    answers = answers_of(engine, [other])
    assert answers[WorkId("r", 1)].finish is FinishReason.CANCELLED
    assert answers[other.work_id].tokens == toy_answer(other)


def test_choices_share_their_prompt_and_copy_what_they_write_to() -> None:
    device = FakeDevice(64)
    engine = device_engine(device)
    engine.submit(work(1, range(10), 7, n=3, sampling=SamplingParams(seed=2**64 - 1)))
    while engine.step_checked():
        pass
    deltas = engine.drain_outputs()
    assert any(step.copies for step in device.steps)
    found = []
    for index in range(3):
        answers: dict[WorkId, Answer] = {}
        gather(deltas, answers, index)
        found.append(answers[WorkId("r", 1)].tokens)
        alone = device_engine(FakeDevice(64))
        seed = (2**64 - 1 + index) % 2**64
        (answer,) = answers_of(alone, [work(1, range(10), 7, sampling=SamplingParams(seed=seed))]).values()
        assert found[-1] == answer.tokens
    assert len(set(map(tuple, found))) == 3


def test_a_constraint_waits_for_its_last_token() -> None:
    engine = device_engine(FakeDevice(64), constraint_for=lambda work: EvenOnly() if work.work_id.number else None)
    answers = answers_of(engine, [greedy(n, [n, 1, 2], 12) for n in range(3)])
    assert answers[WorkId("r", 0)].tokens == toy_answer(greedy(0, [0, 1, 2], 12))
    for number in (1, 2):
        tokens = answers[WorkId("r", number)].tokens
        assert len(set(tokens)) == 12
        assert not any(token % 2 for token in tokens)


def test_log_probabilities_go_to_those_who_asked() -> None:
    engine = device_engine(FakeDevice(64))
    for number, count in enumerate((2, None, 0)):
        engine.submit(greedy(number, [number + 1, 2], 5, num_logprobs=count))
    while engine.step_checked():
        for delta in engine.drain_outputs():
            count = (2, None, 0)[delta.work_id.number]
            if count is None:
                assert delta.logprobs == ()
            else:
                assert [p.logprob for p in delta.logprobs] == [toy_logprob(t) for t in delta.token_ids]
                assert all(len(p.top) == count for p in delta.logprobs)
    assert_idle(engine)


def test_a_dead_device_breaks_the_engine_at_once_and_no_work_ends_for_it() -> None:
    """So that the works go on elsewhere."""
    device = FakeDevice(64)
    engine = device_engine(device)
    engine.submit(greedy(1, [1, 2], 6))
    engine.step()
    engine.drain_outputs()
    device.is_dead = True
    with pytest.raises(DeadDeviceError):
        engine.step()
    assert engine.drain_outputs() == []


def test_one_whose_logits_are_not_finite_fails_alone() -> None:
    engine = device_engine(FakeDevice(64, poison=30))
    good = [greedy(n, [n] * 3, 6) for n in (1, 2)]
    bad = [greedy(3, [5, 30, 5], 6), greedy(4, [5, 6], 6, adapter="style")]
    answers = answers_of(engine, [good[0], *bad, good[1]])
    names = []
    for one in bad:
        last = answers.pop(one.work_id).last
        assert last is not None
        assert last.finish is not None
        assert last.finish.error_reason == Reason.INTERNAL
        names.append(last.finish.error_message.rpartition(" ")[2])
    assert names == ["(FloatingPointError)", "(LookupError)"]
    assert {i: a.tokens for i, a in answers.items()} == {w.work_id: toy_answer(w) for w in good}


class FailingDevice(FakeDevice):
    """Fails for the next `num_failures` steps."""

    num_failures = 0

    def launch(self, step: DeviceStep) -> FakeTicket:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("the device is gone")
        return super().launch(step)


def test_a_device_that_fails_again_and_again_breaks_its_engine() -> None:
    """Or else an empty engine would fail whatever comes, and all would come to it."""
    device = FailingDevice(64)
    engine = device_engine(device)
    works = [greedy(n, [n] * 3, 4) for n in range(9)]
    for one in works[:3]:  # now and then
        device.num_failures = 2
        for again in (one, one):
            assert answers_of(engine, [again])[one.work_id].finish is FinishReason.ERROR
        assert answers_of(engine, [one])[one.work_id].tokens == toy_answer(one)
    device.num_failures = 3
    for one in works[3:5]:
        assert answers_of(engine, [one])[one.work_id].finish is FinishReason.ERROR
    engine.submit(works[5])
    with pytest.raises(RuntimeError, match="the device is gone"):
        engine.step()


def test_a_slot_goes_to_another_only_when_there_is_none_left() -> None:
    device = FakeDevice(64, num_slots=4)
    engine = device_engine(device, max_num_sequences=2)
    for number in range(5):
        answers_of(engine, [greedy(number, [number, 1], 3)])
    given = [newcomer.slot for step in device.steps for newcomer in step.newcomers]
    assert len(given) == 5
    assert len(set(given[:4])) == 4
    assert given[4] == given[0]


def some_work(rng: random.Random, number: int) -> GenerateWork:
    """Of two tokens, so that prefixes collide."""
    max_tokens, n = rng.randint(1, 18), rng.choice((1, 1, 1, 2, 4))
    cuts = [rng.randrange(max_tokens) for _ in range(n)] if rng.random() < 0.1 else ()
    return greedy(
        number,
        [rng.choice((0, 0, 1)) for _ in range(rng.randint(1, 20))],
        max_tokens,
        n=n,
        priority=rng.randint(-1, 1),
        stop_token_ids=frozenset({rng.randrange(4)}),
        min_tokens=rng.choice((0, 0, 5)),
        received=[[rng.randrange(4) for _ in range(cut)] for cut in cuts],
        num_logprobs=rng.choice((None, None, None, 1)),
    )


@pytest.mark.parametrize("seed", range(6))
def test_random_workloads_with_aborts_and_preemption(seed: int) -> None:
    """Whatever comes between: an answer is what it is without, all of it or, if aborted, a beginning; every invariant
    is checked after every step."""
    rng = random.Random(seed)
    device = FakeDevice(9, num_slots=10, vocab_size=4)
    engine = device_engine(device, chunk_tokens=7, max_num_sequences=5, reserve=seed == 5)
    works: list[GenerateWork] = []
    answers: dict[int, dict[WorkId, Answer]] = {index: {} for index in range(4)}
    is_busy = True
    while is_busy or engine.load().num_steps < 400:
        dice = rng.random()
        is_open = engine.load().num_steps < 400
        if is_open and dice < 0.3 and engine.load().num_waiting < 12:
            works.append(some_work(rng, len(works)))
            engine.submit(works[-1])
        elif is_open and dice < 0.35 and works:
            engine.abort(rng.choice(works[-20:]).work_id)
        is_busy = engine.step_checked()
        deltas = engine.drain_outputs()
        for index, of_choice in answers.items():
            gather(deltas, of_choice, index)
    assert_idle(engine)
    assert (engine.load().num_preemptions > 0) == (seed != 5)
    for one in works:
        for index in range(one.n):
            answer, whole = answers[index].pop(one.work_id), toy_answer(one, 4, index=index)
            assert answer.tokens == whole[: len(answer.tokens)]
            assert answer.finish in (FinishReason.CANCELLED, FinishReason.ERROR) or answer.tokens == whole
    assert not any(answers.values())


def test_close_closes_the_device() -> None:
    device = FakeDevice(8)
    engine = device_engine(device)
    engine.submit(greedy(1, [1], 9))
    engine.step_checked()
    engine.close()
    assert device.is_closed
