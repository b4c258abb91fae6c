"""Where the time of each engine step goes: marks on the engine's thread, records for whoever makes metrics and spans.

    engine's thread    scheduled, computed, ended ──► records ──► drain    data plane

Some looks at the clock and one record a step; an engine that nobody watches has none of it. A step that failed has no
record. With steps in flight a record has the times of the call that read the step: what the engine's thread spent.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol, runtime_checkable

from workers.blocks import BlockPool
from workers.plan import StepPlan, Ticket
from workers.scheduler import Scheduler
from workers.types import EngineCounts, SteppedEngine, WorkId

MAX_RECORDS: Final = 4_096
"""That wait to be drained; then the oldest is lost."""


class StepRecord(NamedTuple):
    """One step that was computed. Times in seconds; `began` and `ended` on the clock of the watch."""

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
        self._launched: deque[tuple[int, float]] = deque()
        """Numbers of steps that were not read yet, and when each began."""
        self._began = self._scheduled_at = self._output_at = 0.0
        self._sampled_from: float | None = None
        self._plan: StepPlan | None = None
        """Of the step that was read and has not ended."""
        self._num_preemptions = 0
        self._num_evictions = 0

    def scheduled(self, plan: StepPlan, began: float) -> None:
        """`plan` is what is launched next; to decide it `began` then."""
        self._began, self._scheduled_at, self._plan = began, self._clock(), None
        if plan.chunks:
            self._launched.append((plan.number, began))

    def computed(self, ticket: Ticket, now: float) -> None:
        """The output of a launched step is there."""
        if not self._launched:
            return  # it was launched before anybody watched
        self._plan, self._output_at = ticket.plan, now
        self._sampled_from = getattr(ticket, "computed_at", None)

    def ended(self) -> None:
        """What the step brought is about to be handed over. Without a step that was read it has no effect."""
        plan, now = self._plan, self._clock()
        if plan is None:
            return
        self._plan = None
        began = self._began
        while self._launched and self._launched[0][0] <= plan.number:  # those before it have failed
            _, began = self._launched.popleft()
        ran_until = self._output_at if self._sampled_from is None else self._sampled_from
        self._records.append(
            StepRecord(
                plan=plan,
                began=began,
                ended=now,
                schedule_s=self._scheduled_at - self._began,
                run_s=ran_until - self._scheduled_at,
                sample_s=self._output_at - ran_until,
                emit_s=now - self._output_at,
                preempted=self._preempted(),
                num_evicted_blocks=self._evicted(),
            )
        )

    def drain(self) -> list[StepRecord]:
        """Return the records since the last call, in order. From any thread, one at a time."""
        records = []
        while self._records:
            records.append(self._records.popleft())
        return records

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
    """`PagedEngine` and `FakeEngine`."""
