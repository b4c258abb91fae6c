"""What becomes of the records of steps: metrics, spans `octavo.step`, and what each sampled work is told of its steps.

Off the engine's thread. A step has a span if a sampled work took part, with a link to each of these, and with its error
if it failed; metrics have the times of steps that went well alone. The OpenTelemetry API only. A link costs some 10 µs
here and in the export, and there is one for nearly each token of a sampled request: so they have a budget. Beyond it
only steps have spans that failed or took several times what steps take.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from octavo.metrics import recording_meter
from octavo.names import Attribute, Event, Reason, Span
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Status, StatusCode

from workers.metrics import ReplicaMetrics
from workers.step_watch import Counted, StepRecord, StepWatch, Watchable
from workers.types import Engine, WorkId
from workers.work_spans import Step, WorkSpans, records

LINKS_PER_S: Final = 4_000
"""More than a CPU generates tokens; on a GPU with all requests sampled, some 5 % of a core."""
MAX_SAVED_S: Final = 2.0
"""So long a budget may be saved."""
SLOW: Final = 4.0
"""A step that takes so many times the usual has a span in any case."""
_MEMORY: Final = 0.05
"""The part of each step in what is usual."""
_TRACER = trace.get_tracer("octavo.workers")
_NS = 1_000_000_000


def observe(engine: Engine, replica_id: str, model: str = "") -> StepTelemetry | None:
    """Have this process's metrics be made of `engine`; return what steps are told to, None if nobody wants to know of
    them. What is not set up in this process by now is never asked. `model`: what requests call it, if not as its files
    do."""
    meter, model = recording_meter("octavo.workers"), model or engine.info.model
    if not isinstance(engine, Watchable):
        if meter is not None:
            ReplicaMetrics(meter, engine, model, engine.counts if isinstance(engine, Counted) else None)
        return None
    metrics = None if meter is None else ReplicaMetrics(meter, engine, model, engine.counts)
    if metrics is None and not records():
        return None
    return StepTelemetry(engine.watch(), metrics, replica_id)


class StepTelemetry:
    """Of the engine that `watch` watches. `metrics`: None for spans alone."""

    def __init__(self, watch: StepWatch, metrics: ReplicaMetrics | None, replica_id: str) -> None:
        self._watch = watch
        self._metrics = metrics
        self._replica_id = replica_id
        self._budget = LinkBudget(LINKS_PER_S)
        self._num_untold = 0
        """Steps since the last span that had none for want of budget."""
        self._usual_s = 0.0

    def tell(self, traced: Mapping[WorkId, WorkSpans]) -> None:
        """Account for all steps since the last call. `traced` are the sampled works that have not ended."""
        records = self._watch.drain()
        if not records:
            return
        to_ns = time.time_ns() - round(time.monotonic() * _NS)
        for record in records:
            if traced:
                self._tell(record, traced, to_ns)
            if record.error:
                continue
            if self._metrics is not None:
                self._metrics.step(record)
            self._usual_s += _MEMORY * (record.duration_s - self._usual_s)

    def _tell(self, record: StepRecord, traced: Mapping[WorkId, WorkSpans], to_ns: int) -> None:
        step = Step(record.plan.number, record.began, record.ended, record.duration_s)
        for work_id, num_preemptions in record.preempted:
            if (work := traced.get(work_id)) is not None:
                work.preempted(num_preemptions, step)
        samples: dict[WorkSpans, bool] = {}
        for chunk in record.plan.chunks:
            work = traced.get(chunk.sequence.work.work_id)
            if work is not None:
                # Of a step that failed, whoever was not to blame has been computed alone, as part of it.
                has_drawn = chunk.samples and (not record.error or chunk.sequence.first_token_at is not None)
                samples[work] = has_drawn or samples.get(work, False)
        for work, is_sampling in samples.items():
            work.took_part(step, samples=is_sampling)
        if not samples:
            return
        is_special = bool(record.error) or record.duration_s > SLOW * self._usual_s
        if self._budget.take(len(samples), record.ended) or is_special:
            self._span(record, list(samples), to_ns)
        else:
            self._num_untold += 1

    def _span(self, record: StepRecord, members: list[WorkSpans], to_ns: int) -> None:
        began_ns = round(record.began * _NS) + to_ns
        span = _TRACER.start_span(
            Span.STEP,
            context=Context(),
            start_time=began_ns,
            links=[work.link for work in members],
            attributes={
                Attribute.STEP: record.plan.number,
                Attribute.REPLICA: self._replica_id,
                Attribute.STEP_DURATION: record.duration_s,
                Attribute.STEP_SEQUENCES: len(record.plan.chunks),
                Attribute.STEP_TOKENS: record.plan.num_tokens,
                Attribute.STEP_SCHEDULE_TIME: record.schedule_s,
                Attribute.STEP_RUN_TIME: record.run_s,
                Attribute.STEP_SAMPLE_TIME: record.sample_s,
                Attribute.STEP_EMIT_TIME: record.emit_s,
            },
        )
        if self._num_untold:
            span.set_attribute(Attribute.UNTOLD_STEPS, self._num_untold)
            self._num_untold = 0
        if record.error:
            span.set_attribute(Attribute.ERROR_TYPE, Reason.INTERNAL)
            span.set_status(Status(StatusCode.ERROR, record.error))
        if record.num_evicted_blocks:
            span.add_event(Event.EVICTED, {Attribute.EVICTED_BLOCKS: record.num_evicted_blocks}, began_ns)
        span.end(end_time=round(record.ended * _NS) + to_ns)


class LinkBudget:
    """So many a second, and as many again as `MAX_SAVED_S` brought while fewer were taken."""

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._left = per_s * MAX_SAVED_S
        self._at = 0.0

    def take(self, number: int, now: float) -> bool:
        """Take `number` of them if there are any; what is too much is paid back first."""
        self._left = min(self._left + (now - self._at) * self._per_s, self._per_s * MAX_SAVED_S)
        self._at = now
        if self._left <= 0:
            return False
        self._left -= number
        return True
