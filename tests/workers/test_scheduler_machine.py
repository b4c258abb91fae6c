"""The scheduler under random works, steps, aborts and deadlines."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.workers.scheduler_bench import Bench
from tests.workers.toy_engine import toy_answer, work
from workers.sequence import Sequence
from workers.types import FinishReason


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
