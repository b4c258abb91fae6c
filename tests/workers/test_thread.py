"""The engine's thread: commands in, outputs out, one ending for each work whatever happens."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from octavo.names import Reason

from tests.workers.toy_engine import Answer, EventReader, ToyEngine, gather, toy_answer, work
from workers import thread as thread_module
from workers.config import EngineConfig
from workers.fake import FakeEngine, fake_continuation
from workers.prefix import PrefixHasher
from workers.thread import HAND_OVER_MOST, HAND_OVER_S, EngineThread
from workers.types import FinishReason, Load, SteppedEngine, TokenDelta, Work, WorkId

PATIENCE_S = 20.0


class Consumer:
    """Drains an engine thread whenever it is notified, as a data plane does."""

    def __init__(self, engine: SteppedEngine, max_token_age_s: float = 0.0) -> None:
        self.news = threading.Event()
        self.num_notified = 0
        self.notified_by: set[str] = set()
        self.answers: dict[WorkId, Answer] = {}
        self.reader = EventReader()
        self.thread = EngineThread(engine, self.notify, max_token_age_s=max_token_age_s)

    def notify(self) -> None:
        self.num_notified += 1
        self.notified_by.add(threading.current_thread().name)
        self.news.set()

    def drain(self) -> None:
        gather(self.thread.drain_outputs(), self.answers)
        self.reader.apply(self.thread.kv_events())

    def wait(self, condition: Callable[[], bool]) -> None:
        """Drain until `condition` holds."""
        give_up = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < give_up, "nothing happened"
            self.news.wait(0.05)
            self.news.clear()
            self.drain()

    def ended(self, *numbers: int) -> bool:
        ids = [WorkId("r", number) for number in numbers]
        return all(i in self.answers and self.answers[i].finish is not None for i in ids)


@pytest.fixture
def consume() -> Iterator[Callable[[SteppedEngine], Consumer]]:
    consumers: list[Consumer] = []

    def start(engine: SteppedEngine) -> Consumer:
        consumers.append(Consumer(engine))
        return consumers[-1]

    yield start
    for consumer in consumers:
        consumer.thread.close()
        assert consumer.thread.join(PATIENCE_S)
        assert not consumer.thread.is_alive


Consume = Callable[[SteppedEngine], Consumer]


def test_works_from_many_threads_are_answered(consume: Consume) -> None:
    engine = FakeEngine()
    consumer = consume(engine)
    assert consumer.thread.info is engine.info

    def submit(owner: int) -> None:
        for number in range(owner * 20, owner * 20 + 20):
            consumer.thread.submit(work(number, range(number % 40 + 1), 10))

    submitters = [threading.Thread(target=submit, args=(owner,)) for owner in range(4)]
    for thread in submitters:
        thread.start()
    for thread in submitters:
        thread.join()
    consumer.wait(lambda: consumer.ended(*range(80)))
    for number in range(80):
        expected = fake_continuation(range(number % 40 + 1), 10, engine.info.vocab_size)
        assert consumer.answers[WorkId("r", number)].tokens == expected
    consumer.wait(lambda: consumer.thread.load().num_free_blocks == 4_096)
    assert consumer.notified_by == {"octavo-engine"}


def test_every_choice_of_a_work_ends(consume: Consume) -> None:
    consumer = consume(FakeEngine())
    consumer.thread.submit(work(1, [1], 3, n=2))
    consumer.thread.submit(work(2, [1], 9))
    consumer.wait(lambda: consumer.ended(1, 2))
    consumer.wait(lambda: consumer.thread.load().num_running == 0)
    assert len(consumer.answers[WorkId("r", 1)].tokens) == 3


def test_one_choice_of_a_work_is_aborted_and_the_other_goes_on(consume: Consume) -> None:
    consumer = consume(FakeEngine(EngineConfig(engine="fake", fake_step_s=0.001)))
    task = work(1, [1], 500, n=2)
    consumer.thread.submit(task)
    consumer.wait(lambda: task.work_id in consumer.answers)
    consumer.thread.abort(task.work_id, 0)
    consumer.thread.abort(task.work_id, 7)
    consumer.wait(lambda: consumer.ended(1))
    assert consumer.answers[task.work_id].finish is FinishReason.CANCELLED
    assert len(consumer.answers[task.work_id].tokens) < 500
    consumer.wait(lambda: consumer.thread.load().num_running == 0)
    assert consumer.thread.load().num_computed_tokens >= 500
    assert consumer.thread.load().num_free_blocks == 4_096


def test_an_idle_engine_neither_steps_nor_notifies(consume: Consume) -> None:
    class Counting(FakeEngine):
        num_steps = 0

        def step(self) -> bool:
            self.num_steps += 1
            return super().step()

    engine = Counting()
    consumer = consume(engine)
    consumer.thread.submit(work(1, [1, 2], 3))
    consumer.wait(lambda: consumer.ended(1) and engine.num_steps == 4)
    time.sleep(0.05)
    consumer.drain()
    before = (engine.num_steps, consumer.num_notified)
    time.sleep(0.1)
    assert (engine.num_steps, consumer.num_notified) == before
    assert engine.num_steps == 4


def test_tokens_of_several_steps_are_told_at_once() -> None:
    consumer = Consumer(FakeEngine(EngineConfig(engine="fake", fake_step_s=0.001)), max_token_age_s=60.0)
    try:
        consumer.thread.submit(work(1, [1], 200))
        consumer.wait(lambda: consumer.ended(1))
        assert len(consumer.answers[WorkId("r", 1)].tokens) == 200
        assert consumer.num_notified < 20
    finally:
        consumer.thread.close()
        assert consumer.thread.join(PATIENCE_S)


def test_abort_and_deadline(consume: Consume) -> None:
    consumer = consume(FakeEngine(EngineConfig(engine="fake", fake_step_s=0.001)))
    consumer.thread.submit(work(1, [1], 8_000))
    consumer.thread.submit(work(2, [2], 8_000, deadline=time.monotonic() + 0.05))
    consumer.wait(lambda: consumer.ended(2))
    assert consumer.answers[WorkId("r", 2)].finish is FinishReason.DEADLINE
    consumer.thread.abort(WorkId("r", 1))
    consumer.thread.abort(WorkId("r", 77))
    consumer.wait(lambda: consumer.ended(1))
    assert consumer.answers[WorkId("r", 1)].finish is FinishReason.CANCELLED
    consumer.wait(lambda: consumer.thread.load().num_free_blocks == 4_096)


def test_a_work_that_cannot_run_yet_does_not_miss_its_deadline(consume: Consume) -> None:
    """Its first block is promised by somebody who never fills it: nothing can be computed, yet time goes on."""
    engine = FakeEngine()
    task = work(1, range(40), 3, deadline=time.monotonic() + 0.05)
    (block,) = engine._pool.allocate(1, "nobody") or ()
    hasher = PrefixHasher(b"", 16)
    engine._pool.promise(block, hasher.block(hasher.root(), range(16)))
    consumer = consume(engine)
    consumer.thread.submit(task)
    consumer.wait(lambda: consumer.ended(1))
    assert consumer.answers[WorkId("r", 1)].finish is FinishReason.DEADLINE


def test_a_work_id_in_progress_is_taken_once(consume: Consume) -> None:
    consumer = consume(FakeEngine())
    for _ in range(2):
        consumer.thread.submit(work(1, [1], 500))
    consumer.wait(lambda: consumer.ended(1))
    assert len(consumer.answers[WorkId("r", 1)].tokens) == 500


def test_close_ends_what_runs_and_what_comes_later(consume: Consume) -> None:
    engine = ToyEngine()
    consumer = consume(engine)
    consumer.thread.submit(work(1, [1], 900))
    consumer.wait(lambda: WorkId("r", 1) in consumer.answers)
    consumer.thread.submit(work(2, [1], 900))
    consumer.thread.close()
    consumer.thread.close()
    consumer.thread.submit(work(3, [1], 900))
    assert consumer.thread.join(PATIENCE_S)
    consumer.drain()
    assert consumer.ended(1, 2, 3)
    assert consumer.answers[WorkId("r", 3)].finish is FinishReason.CANCELLED
    assert engine.runner.is_closed
    consumer.thread.submit(work(4, [1], 900, n=2))
    assert [delta.index for delta in consumer.thread.drain_outputs()] == [0, 1]


def test_one_poison_work_fails_alone(consume: Consume) -> None:
    consumer = consume(ToyEngine(poison=666))
    consumer.thread.submit(work(1, [1, 2], 30))
    consumer.thread.submit(work(2, [666], 30))
    consumer.wait(lambda: consumer.ended(1, 2))
    assert consumer.answers[WorkId("r", 1)].tokens == toy_answer(work(1, [1, 2], 30))
    assert consumer.answers[WorkId("r", 2)].finish is FinishReason.ERROR
    assert consumer.thread.failure is None


class Broken(FakeEngine):
    """Fails where it is told to."""

    fails_in = ""

    def step(self) -> bool:
        if self.fails_in == "step":
            raise RuntimeError("step")
        return super().step()

    def submit(self, work: Work) -> None:
        if self.fails_in == "submit":
            raise RuntimeError("submit")
        super().submit(work)

    def abort(self, work_id: WorkId, index: int | None = None) -> None:
        if self.fails_in == "abort":
            raise RuntimeError("abort")
        super().abort(work_id, index)

    def load(self) -> Load:
        if self.fails_in == "load":
            raise RuntimeError("load")
        return super().load()


@pytest.mark.parametrize("place", ["step", "abort", "load"])
def test_a_broken_engine_ends_all_works_and_says_so(consume: Consume, place: str) -> None:
    engine = Broken(EngineConfig(engine="fake", fake_step_s=0.001))
    consumer = consume(engine)
    consumer.thread.submit(work(1, [1], 8_000))
    consumer.thread.submit(work(2, [1], 8_000))
    consumer.wait(lambda: len(consumer.answers) == 2)
    engine.fails_in = place
    consumer.thread.abort(WorkId("r", 99))
    consumer.wait(lambda: consumer.ended(1, 2))
    assert isinstance(consumer.thread.failure, RuntimeError)
    consumer.thread.submit(work(3, [1], 3))
    consumer.wait(lambda: consumer.ended(3))
    for number, reason in ((1, Reason.REPLICA_LOST), (2, Reason.REPLICA_LOST), (3, Reason.DRAINING)):
        last = consumer.answers[WorkId("r", number)].last
        assert last is not None
        assert last.finish is not None
        assert last.finish.error_message == "the engine of this replica failed (RuntimeError)"
        assert last.finish.error_reason == reason
    assert consumer.thread.is_alive


def test_a_work_that_ends_in_the_step_that_breaks_the_engine_ends_as_lost(consume: Consume) -> None:
    """Its end was counted and lost, so that nobody ever heard of it again."""
    engine = Broken()
    consumer = consume(engine)
    engine.fails_in = "load"
    consumer.thread.submit(work(1, [1], 1))
    consumer.wait(lambda: consumer.ended(1))
    assert consumer.answers[WorkId("r", 1)].finish is FinishReason.ERROR


def test_a_work_whose_submission_fails_ends_alone(consume: Consume) -> None:
    engine = Broken()
    consumer = consume(engine)
    engine.fails_in = "submit"
    consumer.thread.submit(work(1, [1], 3))
    consumer.wait(lambda: consumer.ended(1))
    engine.fails_in = ""
    consumer.thread.submit(work(2, [1], 3))
    consumer.wait(lambda: consumer.ended(2))
    assert consumer.answers[WorkId("r", 1)].finish is FinishReason.ERROR
    assert consumer.answers[WorkId("r", 2)].finish is FinishReason.LENGTH


def test_an_ending_without_the_engine_is_told_of() -> None:
    """By an engine that has nothing else to say, too: nobody would ask."""
    engine = Broken()
    engine.fails_in = "submit"
    consumer = Consumer(engine, max_token_age_s=60.0)
    try:
        consumer.thread.submit(work(1, [1], 3))
        assert consumer.news.wait(PATIENCE_S)
        consumer.drain()
        assert consumer.ended(1)
    finally:
        consumer.thread.close()
        assert consumer.thread.join(PATIENCE_S)


def test_deltas_after_an_ending_are_dropped(consume: Consume) -> None:
    """An engine that speaks of a work which has ended, or which nobody submitted, is not heard."""

    class Babbling(FakeEngine):
        def drain_outputs(self) -> list[TokenDelta]:
            return [*super().drain_outputs(), TokenDelta(work_id=WorkId("r", 5), token_ids=(1,))]

    consumer = consume(Babbling())
    consumer.thread.submit(work(1, [1], 3))
    consumer.wait(lambda: consumer.ended(1))
    assert consumer.answers.keys() == {WorkId("r", 1)}


class Ahead(FakeEngine):
    """Says that a device computes while nobody steps it, and notes in `log` how many outputs each step brought."""

    def __init__(self, log: list[int | str], *, is_ahead: bool = True) -> None:
        super().__init__()
        self._log = log
        self._is_ahead = is_ahead
        self.before_step: Callable[[], None] = lambda: None

    @property
    def is_ahead(self) -> bool:
        return self._is_ahead

    def step(self) -> bool:
        self.before_step()
        return super().step()

    def drain_outputs(self) -> list[TokenDelta]:
        outputs = super().drain_outputs()
        self._log.append(len(outputs))
        return outputs


class Taken(threading.Event):
    """Notes in `log` that somebody waits for it, and for how long at most."""

    def __init__(self, log: list[int | str], waits: list[float | None]) -> None:
        super().__init__()
        self._log = log
        self._waits = waits

    def wait(self, timeout: float | None = None) -> bool:
        self._log.append("waits")
        self._waits.append(timeout)
        return super().wait(timeout)


def test_whoever_drains_goes_before_the_next_step(consume: Consume, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that was to be launched only when the one before it is over held up who was to send its tokens."""
    monkeypatch.setattr(thread_module, "HAND_OVER_S", PATIENCE_S)
    engine, left = Ahead([]), list[int]()
    consumer = consume(engine)
    engine.before_step = lambda: left.append(len(consumer.thread._outputs))
    consumer.thread.submit(work(1, [1], 9))
    while not consumer.ended(1):
        assert consumer.news.wait(PATIENCE_S)
        consumer.news.clear()
        time.sleep(0.002)  # for many a step of an engine that does not wait
        consumer.drain()
    consumer.wait(lambda: consumer.thread.load().num_running == 0)
    assert left[:9] == [0] * 9


def test_who_drains_when_it_is_told_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_module, "HAND_OVER_S", 10 * PATIENCE_S)
    answers: dict[WorkId, Answer] = {}
    has_ended = threading.Event()

    def take() -> None:
        gather(thread.drain_outputs(), answers)
        if any(answer.finish is not None for answer in answers.values()):
            has_ended.set()

    thread = EngineThread(Ahead([]), take)
    try:
        thread.submit(work(1, [1], 9))
        assert has_ended.wait(PATIENCE_S)
    finally:
        thread.close()
        assert thread.join(PATIENCE_S)


def test_what_was_taken_before_it_is_announced_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is awake already may drain between the two."""
    monkeypatch.setattr(thread_module, "HAND_OVER_S", 10 * PATIENCE_S)
    answers: dict[WorkId, Answer] = {}
    has_ended = threading.Event()
    thread = EngineThread(Ahead([]), lambda: None)
    is_due = thread._emission.is_due

    def take_first(**keys: Any) -> bool:
        gather(thread.drain_outputs(), answers)
        if any(answer.finish is not None for answer in answers.values()):
            has_ended.set()
        return is_due(**keys)

    monkeypatch.setattr(thread._emission, "is_due", take_first)
    try:
        thread.submit(work(1, [1], 9))
        assert has_ended.wait(PATIENCE_S)
    finally:
        thread._taken.set()
        thread.close()
        assert thread.join(PATIENCE_S)


@pytest.mark.parametrize("is_ahead", [True, False])
def test_few_tokens_are_waited_for_a_moment_and_only_while_a_device_computes(consume: Consume, is_ahead: bool) -> None:
    """By an engine from which nobody takes them: its works end all the same."""
    log, waits, most = list[int | str](), list[float | None](), HAND_OVER_MOST + 4
    engine, can_go = Ahead(log, is_ahead=is_ahead), threading.Event()
    engine.before_step = lambda: assert_true(can_go.wait(PATIENCE_S))
    consumer = consume(engine)
    consumer.thread._taken = Taken(log, waits)
    for number in range(most):
        consumer.thread.submit(work(number, [1], 3 + number))
    can_go.set()
    give_up = time.monotonic() + PATIENCE_S
    while (load := consumer.thread.load()).num_taken != most or load.num_running or load.num_waiting:
        assert time.monotonic() < give_up, "nothing happened"
        time.sleep(0.01)
    waited_after = [before for before, entry in itertools.pairwise(log) if entry == "waits"]
    expected = [entry for entry in log if isinstance(entry, int) and is_ahead and 0 < entry <= HAND_OVER_MOST]
    assert waited_after == expected
    assert waits == [HAND_OVER_S] * len(expected)
    assert expected or not is_ahead, "few came"
    assert any(isinstance(entry, int) and entry > HAND_OVER_MOST for entry in log), "many came"
    consumer.drain()
    assert consumer.ended(*range(most))


def assert_true(condition: bool) -> None:
    assert condition
