"""A scheduler on a bench: its pool, a toy runner and a reader of its KV events; each step is checked."""

from __future__ import annotations

from tests.workers.toy_engine import BLOCK_SIZE, Answer, EventReader, ToyRunner, assert_plan, gather
from workers.blocks import BlockPool
from workers.plan import StepPlan
from workers.prefix import PrefixHasher
from workers.scheduler import Scheduler
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId


class Bench:
    """A scheduler, its pool and a toy runner; each step is checked."""

    def __init__(
        self,
        num_blocks: int = 64,
        *,
        chunk_tokens: int = 16,
        max_num_sequences: int = 8,
        prefix_cache: bool = True,
        reserve: bool = False,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.hasher = PrefixHasher(b"test", BLOCK_SIZE)
        self.chunk_tokens = chunk_tokens
        self.scheduler = Scheduler(
            pool=self.pool,
            hasher=self.hasher,
            chunk_tokens=chunk_tokens,
            max_num_sequences=max_num_sequences,
            prefix_cache=prefix_cache,
            reserve=reserve,
        )
        self.runner = ToyRunner(num_blocks)
        self.reader = EventReader()
        self.answers: dict[WorkId, Answer] = {}
        self.now = 0.0
        self.num_added = 0

    def add(self, work: GenerateWork) -> Sequence:
        self.num_added += 1
        sequence = Sequence(work, arrival=self.num_added, arrived_at=self.now)
        assert self.scheduler.refusal(sequence) is None
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> StepPlan:
        plan = self.scheduler.schedule(self.now)
        assert_plan(plan, self.pool, self.chunk_tokens)
        return plan

    def commit(self, plan: StepPlan) -> None:
        if plan.chunks:
            self.scheduler.commit(plan, self.runner.launch(plan).output(), self.now)
        self.check()

    def step(self) -> StepPlan:
        plan = self.plan()
        self.commit(plan)
        return plan

    def check(self) -> None:
        self.scheduler.check_integrity()
        self.reader.apply(self.pool.drain_events())
        assert self.reader.resident == self.pool.resident_hashes()
        gather(self.scheduler.commits.drain(), self.answers)

    def run(self, max_steps: int = 1_000) -> None:
        for _ in range(max_steps):
            if not self.step().chunks:
                return
        raise AssertionError(f"still busy after {max_steps} steps")

    def answer(self, sequence: Sequence) -> Answer:
        return self.answers[sequence.work.work_id]


def shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """Return (work, start, tokens, samples) of each chunk."""
    return [(c.sequence.work.work_id.number, c.start, c.num_tokens, c.samples) for c in plan.chunks]
