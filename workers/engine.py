"""The engine `paged`: scheduler, block pool and runner behind the engine seam, stepped by hand.

Owns the works in progress. A plain synchronous object, not thread safe: `EngineThread` gives it a thread and an inbox.
Knows token ids and choices, no text, no network, no device.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from octavo.names import Reason

from workers.blocks import BlockPool
from workers.config import CHUNK_TOKENS, EngineConfig
from workers.errors import ConfigError
from workers.lookup import PromptLookup
from workers.plan import Constraint, Proposer, Runner, StepPlan, Ticket, verifies_drafts
from workers.prefix import PrefixHasher
from workers.scheduler import Scheduler
from workers.sequence import Sequence
from workers.stall import StallingRunner
from workers.standing import counts_of, load_of
from workers.step_watch import StepWatch
from workers.types import (
    EngineCounts,
    EngineInfo,
    Finish,
    FinishReason,
    GenerateWork,
    KvEvent,
    Load,
    TokenDelta,
    Work,
    WorkId,
)

CHECK_INTERVAL_S = 10.0
"""An engine that becomes idle checks its blocks, this often at most."""
CHECK_PAUSE = 1_000
"""And then not for so many times as long as that took: a request that comes meanwhile waits for it."""
MAX_FAILED_STEPS = 3
"""So many in a row on a device that works ahead: then it is broken, and with it the engine."""

_log = logging.getLogger(__name__)


class PagedEngine:
    """Implements `SteppedEngine`. `info` says how many blocks of which size `runner` has; `hasher` has that size too.

    `lag` is how many steps are launched before the first of them is read: 0 for a runner that computes in `launch`, 1
    for a device that works on one step while the next is decided. `constraint_for` makes the constraint of a work.
    Raises ConfigError if `config` asks for what `runner` cannot do.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        info: EngineInfo,
        runner: Runner,
        hasher: PrefixHasher,
        clock: Callable[[], float] = time.monotonic,
        lag: int = 0,
        constraint_for: Callable[[GenerateWork], Constraint | None] = lambda work: None,
    ) -> None:
        assert hasher.block_size == info.block_size
        if config.lookup_tokens and not verifies_drafts(runner):
            raise ConfigError(
                f"engine.lookup_tokens must be 0 with engine {info.engine}, which cannot verify drafts here; is "
                f"{config.lookup_tokens}"
            )
        self._config = config
        self._info = info
        self._runner: Runner = StallingRunner(runner, Path(config.stall_file)) if config.stall_file else runner
        self._clock = clock
        self._lag = lag
        self._fatal_errors: tuple[type[Exception], ...] = getattr(runner, "fatal_errors", ())
        self._constraint_for = constraint_for
        self._chunk_tokens = config.chunk_tokens or CHUNK_TOKENS
        self._pool = BlockPool(info.num_blocks)
        self._scheduler = Scheduler(
            pool=self._pool,
            hasher=hasher,
            chunk_tokens=self._chunk_tokens,
            max_num_sequences=config.max_num_sequences,
            prefix_cache=config.prefix_cache,
            reserve=config.reserve,
            prefill_interval=lambda: getattr(runner, "prefill_interval", 1),
        )
        self._works: dict[WorkId, list[Sequence]] = {}
        """The sequences of each work that has not ended."""
        self._launched: deque[Ticket] = deque()
        self._outputs: list[TokenDelta] = []
        self._num_arrivals = 0
        self._num_taken = 0
        self._num_failed_steps = 0
        """Since the last one that could be read."""
        self._check_at = clock() + CHECK_INTERVAL_S
        self._watch: StepWatch | None = None
        self._is_closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def is_ahead(self) -> bool:
        """See `WatchableEngine`."""
        return bool(self._launched)

    def submit(self, work: Work) -> None:
        """Take `work` on; see `Engine`. A work whose id is in progress already is the same work: no effect."""
        self._num_taken += 1
        if work.work_id in self._works:
            return
        if self._is_closed:
            self._refuse(work, FinishReason.CANCELLED)
        elif not isinstance(work, GenerateWork):
            message = f"engine {self._info.engine} serves {', '.join(sorted(self._info.capabilities))} only"
            self._refuse(work, FinishReason.ERROR, Reason.ENGINE_CAPABILITY, message)
        elif not work.prompt:
            self._refuse(work, FinishReason.ERROR, Reason.EMPTY_PROMPT, "prompt must have at least one token")
        elif (too_long := self._too_long(work)) is not None:  # before each of its choices has a copy of the prompt
            self._refuse(work, FinishReason.ERROR, Reason.PROMPT_TOO_LONG, too_long)
        else:
            self._submit(work)

    def abort(self, work_id: WorkId, index: int | None = None) -> None:
        now = self._clock()
        for sequence in self._works.get(work_id, ()):
            if index is None or index == sequence.index:
                self._scheduler.end(sequence, FinishReason.CANCELLED, now)
        self._collect()

    def step(self) -> bool:
        """Run one step; return whether there was anything to do. Raises what the device says once it is broken."""
        watch, began = self._watch, self._clock()
        plan = self._scheduler.schedule(began)
        if watch is not None:
            watch.scheduled(plan, began)
        try:
            if plan.chunks:
                self._launched.append(self._runner.launch(plan))
            is_due = len(self._launched) > (self._lag if plan.chunks else 0)
            output = self._launched[0].output() if is_due else None
        except Exception as error:
            if watch is not None:
                watch.failed(error)
            self._isolate(plan, error)
            is_due = True
        else:
            if output is not None:
                ticket, now = self._launched.popleft(), self._clock()
                self._num_failed_steps = 0
                if watch is not None:
                    watch.computed(ticket.plan, now, getattr(ticket, "computed_at", None))
                for i, own_error in output.errors.items():
                    self._fail(ticket.plan.chunks[i].sequence, own_error)
                self._scheduler.commit(ticket.plan, output, now)
        self._collect()
        if plan.chunks or is_due:
            return True
        self._check_when_due()
        return False

    def drain_outputs(self) -> list[TokenDelta]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def kv_events(self, *, anew: bool = False) -> list[KvEvent]:
        return self._pool.events_anew() if anew else self._pool.drain_events()

    def load(self) -> Load:
        return load_of(self._scheduler, self._pool, self._chunk_tokens, self._config.max_num_sequences, self._num_taken)

    def counts(self) -> EngineCounts:
        """Return what only metrics need. From any thread; its numbers may be of two steps that follow each other."""
        return counts_of(self._scheduler, self._pool)

    def watch(self) -> StepWatch:
        """Have steps timed from now on. Who steps the engine says `ended` after each, and whoever wants to drains."""
        self._watch = StepWatch(self._scheduler, self._pool, self._clock)
        return self._watch

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        for work_id in list(self._works):
            self.abort(work_id)
        self._launched.clear()
        self._runner.close()

    def check_integrity(self) -> None:
        """Assert every invariant of scheduler and pool; between steps."""
        self._scheduler.check_integrity()
        live = {id(s) for sequences in self._works.values() for s in sequences if not s.is_ended}
        assert live == {id(s) for s in [*self._scheduler.waiting, *self._scheduler.running]}

    def _submit(self, work: GenerateWork) -> None:
        now = self._clock()
        sequences: list[Sequence] = []
        for index in range(work.n):
            self._num_arrivals += 1
            constraint = self._constraint_for(work)
            sequences.append(
                Sequence(
                    work,
                    index=index,
                    arrival=self._num_arrivals,
                    arrived_at=now if work.arrived_at is None else work.arrived_at,
                    constraint=constraint,
                    # Choices that go on after tokens of their own share what the cache has, and no block in part.
                    leader=sequences[0] if sequences and not work.received else None,
                    proposer=self._proposer() if constraint is None else None,
                )
            )
        self._works[work.work_id] = sequences
        for sequence in sequences:
            refusal = self._scheduler.refusal(sequence)
            complete = sequence.ending()
            if refusal is not None:
                self._scheduler.end(sequence, FinishReason.ERROR, now, error=(Reason.PROMPT_TOO_LONG, refusal))
            elif complete is not None:
                self._scheduler.end(sequence, complete, now)
            else:
                self._scheduler.add(sequence)
        self._collect()

    def _proposer(self) -> Proposer | None:
        """Return what guesses for a new sequence."""
        return PromptLookup(self._config.lookup_tokens) if self._config.lookup_tokens else None

    def _too_long(self, work: GenerateWork) -> str | None:
        if len(work.prompt) + work.max_tokens <= self._info.max_model_len:
            return None
        return (
            f"prompt ({len(work.prompt)} tokens) + max_tokens ({work.max_tokens}) must be at most "
            f"{self._info.max_model_len} tokens"
        )

    def _refuse(self, work: Work, reason: FinishReason, error_reason: str = "", message: str = "") -> None:
        """End a work that never got a sequence."""
        finish = Finish(reason=reason, error_reason=error_reason, error_message=message)
        num_choices = work.n if isinstance(work, GenerateWork) else 1
        self._outputs += [TokenDelta(work_id=work.work_id, index=index, finish=finish) for index in range(num_choices)]

    def _isolate(self, plan: StepPlan, error: Exception) -> None:
        """Find out whose fault a failed step is: compute its chunks one by one, and end those that fail alone.

        A chunk computed twice writes the same values to the same places, and blocks that were copied from are still
        held. With steps in flight this cannot be told, and all their sequences end. Raises `error` if the engine is
        broken by now.
        """
        if self._lag:
            self._num_failed_steps += 1
            if self._num_failed_steps == MAX_FAILED_STEPS or isinstance(error, self._fatal_errors):
                raise error
            plans = [*(ticket.plan for ticket in self._launched), plan]
            self._launched.clear()
            for failed in plans:
                self._scheduler.end_copies(failed)
                for chunk in failed.chunks:
                    self._fail(chunk.sequence, error)
            return
        self._launched.clear()
        if len(plan.chunks) == 1:
            self._fail(plan.chunks[0].sequence, error)
        else:
            for chunk in plan.chunks:
                table = chunk.sequence.block_table
                copies = tuple(copy for copy in plan.copies if copy[1] in table)
                alone = StepPlan(plan.number, (chunk,), copies)
                try:
                    output = self._runner.launch(alone).output()
                except Exception as own_error:
                    self._fail(chunk.sequence, own_error)
                else:
                    self._scheduler.commit(alone, output, self._clock())
        self._scheduler.end_copies(plan)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        work = sequence.work
        request = {"request_id": work.request_id, "traceparent": work.traceparent}
        _log.error("sequence %s of %s failed", sequence.index, work.work_id, exc_info=error, extra=request)
        message = f"the engine could not compute this request ({type(error).__name__})"
        self._scheduler.end(sequence, FinishReason.ERROR, self._clock(), error=(Reason.INTERNAL, message))

    def _collect(self) -> None:
        """Take the scheduler's deltas over, and forget works all of whose choices have ended."""
        deltas = self._scheduler.commits.drain()
        self._outputs += deltas
        for work_id in [delta.work_id for delta in deltas if delta.finish is not None]:
            if all(s.is_ended for s in self._works.get(work_id, ())):
                self._works.pop(work_id, None)

    def _check_when_due(self) -> None:
        now = self._clock()
        if not self._works and now >= self._check_at:
            self.check_integrity()
            self._check_at = now + max(CHECK_INTERVAL_S, CHECK_PAUSE * (self._clock() - now))
