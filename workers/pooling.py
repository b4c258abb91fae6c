"""The engine `transformers` for models that embed, score and classify: a queue, and batches of whole sequences.

Owns the works in progress. A plain synchronous object, as `PagedEngine` is: `EngineThread` gives it a thread. A step
takes works by priority, then arrival, up to a budget of tokens; nothing is kept of them, so there are no blocks.

Whoever was in none of `MAX_IDLE_STEPS` steps goes first, one of them a step, by arrival. So, whatever comes later, a
work is computed within MAX_IDLE_STEPS + e + 1 steps, e being those here that arrived before it. The router does not see
to that: its order is strict, and the credit that is left brings enough of smaller priorities to fill every step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol, cast

from octavo.names import Reason

from workers.blocks import BlockPool
from workers.errors import CapabilityError
from workers.plan import Chunk, StepPlan
from workers.precedence import MAX_IDLE_STEPS
from workers.prefix import PrefixHasher
from workers.scheduler import Scheduler
from workers.sequence import Sequence
from workers.step_watch import StepWatch
from workers.types import (
    EngineCounts,
    EngineInfo,
    Finish,
    FinishReason,
    KvEvent,
    Load,
    PoolWork,
    TokenDelta,
    Work,
    WorkId,
)

STEP_TOKENS = 2_048
"""Of a step, unless `chunk_tokens` says another number: a batch of 32 paragraphs. A longer sequence goes alone."""

_log = logging.getLogger(__name__)


class PoolingModel(Protocol):
    def pool(self, works: Seq[PoolWork]) -> list[tuple[float, ...]]:
        """Return the numbers of each work, in their order."""


class _Waiting(NamedTuple):
    rank: tuple[int, int]
    work: PoolWork
    arrived_at: float
    after_step: int
    """The last one before it came."""


class _Row(NamedTuple):
    """What whoever tells of a step asks of a chunk's sequence."""

    work: PoolWork
    first_token_at: float | None = None


def _plan(number: int, batch: Seq[_Waiting]) -> StepPlan:
    """Return what a step computes, in the words of engines that generate."""
    chunks = [Chunk(cast("Sequence", _Row(each.work)), 0, len(each.work.tokens), samples=False) for each in batch]
    return StepPlan(number, tuple(chunks))


class PoolingEngine:
    """Implements `WatchableEngine`. `step_tokens`: the budget of a step."""

    is_ahead = False

    def __init__(
        self,
        model: PoolingModel,
        *,
        info: EngineInfo,
        hasher: PrefixHasher,
        step_tokens: int = STEP_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._model = model
        self._info = info
        self._hasher = hasher
        self._step_tokens = step_tokens
        self._clock = clock
        self._waiting: dict[WorkId, _Waiting] = {}
        """By arrival."""
        self._outputs: list[TokenDelta] = []
        self._num_taken = self._num_steps = self._num_tokens = self._num_prompt_tokens = 0
        self._is_closed = False
        self._watch: StepWatch | None = None

    @property
    def info(self) -> EngineInfo:
        return self._info

    def submit(self, work: Work) -> None:
        """Take `work` on; see `Engine`. One whose id is in progress already is the same work: no effect."""
        self._num_taken += 1
        if work.work_id in self._waiting:
            return
        if self._is_closed:
            self._end(work, FinishReason.CANCELLED)
        elif not isinstance(work, PoolWork):
            message = f"engine {self._info.engine} with this model serves {', '.join(sorted(self._info.capabilities))}"
            self._end(work, FinishReason.ERROR, Reason.ENGINE_CAPABILITY, f"{message} only")
        elif not work.tokens:
            self._end(work, FinishReason.ERROR, Reason.EMPTY_PROMPT, "an input must have at least one token")
        elif len(work.tokens) > self._info.max_model_len:
            message = f"an input must have at most {self._info.max_model_len} tokens, has {len(work.tokens)}"
            self._end(work, FinishReason.ERROR, Reason.PROMPT_TOO_LONG, message)
        else:
            self._num_prompt_tokens += len(work.tokens)
            rank = work.priority, self._num_taken
            self._waiting[work.work_id] = _Waiting(rank, work, self._clock(), self._num_steps)

    def abort(self, work_id: WorkId, index: int | None = None) -> None:
        if (waiting := self._waiting.pop(work_id, None)) is not None:
            self._end(waiting.work, FinishReason.CANCELLED)

    def step(self) -> bool:
        """Compute a batch; return whether there was one."""
        now = self._clock()
        for waiting in [each for each in self._waiting.values() if (each.work.deadline or now + 1) <= now]:
            del self._waiting[waiting.work.work_id]
            self._end(waiting.work, FinishReason.DEADLINE)
        batch = self._next_batch()
        if not batch:
            return False
        for each in batch:
            del self._waiting[each.work.work_id]
        self._num_steps += 1
        if (watch := self._watch) is None:
            self._compute(batch, now)
        else:
            plan = _plan(self._num_steps, batch)
            watch.scheduled(plan, now)
            self._compute(batch, now)
            watch.computed(plan, self._clock())
        return True

    def drain_outputs(self) -> list[TokenDelta]:
        outputs, self._outputs = self._outputs, []
        return outputs

    def kv_events(self, *, anew: bool = False) -> list[KvEvent]:
        return []

    def load(self) -> Load:
        owed = sum(len(each.work.tokens) for each in self._waiting.values())
        return Load(
            num_waiting=len(self._waiting),
            owed_prefill_tokens=owed,
            credit_tokens=max(0, 2 * self._step_tokens - owed),
            num_computed_tokens=self._num_tokens,
            num_steps=self._num_steps,
            num_taken=self._num_taken,
        )

    def counts(self) -> EngineCounts:
        return EngineCounts(num_prompt_tokens=self._num_prompt_tokens)

    def watch(self) -> StepWatch:
        """See `PagedEngine.watch`. There are no blocks here that sequences could give up."""
        pool = BlockPool(1)
        scheduler = Scheduler(pool=pool, hasher=self._hasher, chunk_tokens=1, max_num_sequences=1)
        self._watch = StepWatch(scheduler, pool, self._clock)
        return self._watch

    def close(self) -> None:
        self._is_closed = True
        for work_id in list(self._waiting):
            self.abort(work_id)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        left = self._step_tokens
        queue = sorted(self._waiting.values())
        first = next(iter(self._waiting.values()), None)
        if first is not None and self._num_steps - first.after_step >= MAX_IDLE_STEPS:
            queue.sort(key=lambda each: each is not first)
        for waiting in queue:
            left -= len(waiting.work.tokens)
            if batch and left < 0:
                break
            batch.append(waiting)
        return batch

    def _compute(self, batch: list[_Waiting], began: float) -> None:
        """Compute a batch; if that fails, its works one by one, so that each suffers for itself alone."""
        try:
            vectors = self._model.pool([each.work for each in batch])
        except Exception as error:
            if self._watch is not None:
                self._watch.failed(error)
            if len(batch) > 1:
                for each in batch:
                    self._compute([each], began)
                return
            _log.error("work %s failed", batch[0].work.work_id, exc_info=error)
            if isinstance(error, CapabilityError):
                self._end(batch[0].work, FinishReason.ERROR, Reason.ENGINE_CAPABILITY, str(error))
            else:
                message = f"the engine could not compute this request ({type(error).__name__})"
                self._end(batch[0].work, FinishReason.ERROR, Reason.INTERNAL, message)
            return
        self._num_tokens += sum(len(each.work.tokens) for each in batch)
        now = self._clock()
        for each, vector in zip(batch, vectors, strict=True):
            finish = Finish(
                reason=FinishReason.STOP,
                queue_s=began - each.arrived_at,
                prefill_s=now - began,
                num_steps=1,
                ended_at=now,
            )
            self._outputs.append(
                TokenDelta(work_id=each.work.work_id, finish=finish, num_cached_tokens=0, pooled=vector)
            )

    def _end(self, work: Work, reason: FinishReason, error_reason: str = "", message: str = "") -> None:
        finish = Finish(reason=reason, error_reason=error_reason, error_message=message)
        self._outputs += [
            TokenDelta(work_id=work.work_id, index=index, finish=finish) for index in range(work.num_choices)
        ]
