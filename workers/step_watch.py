"""Where the time of each engine step goes: marks on the engine's thread, records for whoever makes metrics and spans.

    engine's thread    scheduled, computed, ended ──► records ──► drain    data plane

Some looks at the clock and one record a step; an engine that nobody watches has none of it. A step that failed has one,
too, and so has each that was in flight behind it. With steps in flight a record has the times of the call that read the
step: what the engine's thread spent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, runtime_checkable

from workers.blocks import BlockPool
from workers.plan import StepPlan
from workers.scheduler import Scheduler
from workers.types import EngineCounts, SteppedEngine, WorkId

MAX_RECORDS: Final = 4_096
"""That wait to be drained; then the oldest is lost."""


class StepRecord(NamedTuple):
    """One step that was launched. Times in seconds; `began` and `ended` on the clock of the watch."""

    plan: StepPlan
    began: float
    """When it began to be planned; with steps in flight, before the one that was read last."""
    ended: float
    schedule_s: float
    run_s: float
    sample_s: float
    emit_s: float
    preempted: tuple[tuple[WorkId, int], ...] = ()
    """Works that had to give their blocks up since the last record, each with how often that happened to it so far."""
    num_evicted_blocks: int = 0
    """Since the last record."""
    error: str = ""
    """The type of what it failed with; empty if it did not. Then `run_s` is all the time until it was known whose fault
    that was."""

    @property
    def duration_s(self) -> float:
        """What the engine's thread took for it."""
        return self.schedule_s + self.run_s + self.sample_s + self.emit_s


class StepWatch:
    """Of the engine that has this scheduler and pool. All but `drain` on the engine's thread."""

    def __init__(self, scheduler: Scheduler, pool: BlockPool, clock: Callable[[], float] = time.monotonic) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._clock = clock
        self._records: deque[StepRecord] = deque(maxlen=MAX_RECORDS)
        self._launched: deque[tuple[StepPlan, float]] = deque()
        """Steps that were not read yet, and when each began."""
        self._began = self._scheduled_at = self._output_at = 0.0
        self._sampled_from: float | None = None
        self._plan: StepPlan | None = None
        """Of the step that was read and has not ended."""
        self._error = ""
        """The type of what the steps that were not read have failed with."""
        self._num_preemptions = 0
        self._num_evictions = 0

    def scheduled(self, plan: StepPlan, began: float) -> None:
        """`plan` is what is launched next; to decide it `began` then."""
        self._began, self._scheduled_at, self._plan, self._error = began, self._clock(), None, ""
        if plan.chunks:
            self._launched.append((plan, began))

    def computed(self, plan: StepPlan, now: float, sampled_from: float | None = None) -> None:
        """The output of a launched step is there; `sampled_from`: since when tokens were drawn, if that is known."""
        if not self._launched:
            return  # it was launched before anybody watched
        self._plan, self._output_at, self._sampled_from = plan, now, sampled_from

    def failed(self, error: BaseException) -> None:
        """A step that was launched, or was to be, brought this instead of an output; so do those behind it."""
        self._error = type(error).__name__

    def ended(self) -> None:
        """What the step brought is about to be handed over. Without one that was read or failed it has no effect."""
        plan, error, now = self._plan, self._error, self._clock()
        self._plan, self._error = None, ""
        if error:
            while self._launched:
                failed, began = self._launched.popleft()
                self._record(failed, began, now, ran_until=now, output_at=now, error=error)
        elif plan is not None:
            began = self._began
            while self._launched and self._launched[0][0].number <= plan.number:
                _, began = self._launched.popleft()
            ran_until = self._output_at if self._sampled_from is None else self._sampled_from
            self._record(plan, began, now, ran_until=ran_until, output_at=self._output_at)

    def drain(self) -> list[StepRecord]:
        """Return the records since the last call, in order. From any thread, one at a time."""
        records = []
        while self._records:
            records.append(self._records.popleft())
        return records

    def _record(
        self, plan: StepPlan, began: float, now: float, *, ran_until: float, output_at: float, error: str = ""
    ) -> None:
        self._records.append(
            StepRecord(
                plan=plan,
                began=began,
                ended=now,
                schedule_s=self._scheduled_at - self._began,
                run_s=ran_until - self._scheduled_at,
                sample_s=output_at - ran_until,
                emit_s=now - output_at,
                preempted=self._preempted(),
                num_evicted_blocks=self._evicted(),
                error=error,
            )
        )

    def _preempted(self) -> tuple[tuple[WorkId, int], ...]:
        before, self._num_preemptions = self._num_preemptions, self._scheduler.num_preemptions
        if before == self._num_preemptions:
            return ()
        return tuple((s.work.work_id, s.num_preemptions) for s in self._scheduler.waiting if s.num_preemptions)

    def _evicted(self) -> int:
        before, self._num_evictions = self._num_evictions, self._pool.num_evictions
        return self._num_evictions - before


@runtime_checkable
class Counted(Protocol):
    """An engine that counts what only metrics need."""

    def counts(self) -> EngineCounts:
        """Return it; from any thread."""


@runtime_checkable
class Watchable(Counted, Protocol):
    """An engine that can be watched."""

    def watch(self) -> StepWatch:
        """Have steps timed from now on. Who steps the engine says `ended` after each; anybody may drain."""


class WatchableEngine(SteppedEngine, Watchable, Protocol):
    """`PagedEngine`, `FakeEngine` and `PoolingEngine`."""

    @property
    def is_ahead(self) -> bool:
        """Whether a device computes a step while nobody steps the engine."""
