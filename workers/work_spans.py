"""What a replica adds to a request's trace: `octavo.engine.queue`, `octavo.prefill` and `octavo.decode`.

Made when the work has ended, with explicit times, under the router's dispatch span. The OpenTelemetry API only. The
engine measures when its phases were; which steps it took part in, and what happened to it meanwhile, comes from the
records of steps (`step_watch.py`). A work whose parent was not sampled costs one look at a string.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from octavo.names import Attribute, Event, Span
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from workers.types import Finish, FinishReason, GenerateWork, TokenDelta, Work

_TRACER = trace.get_tracer("octavo.workers")
_PROPAGATOR = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class Step(NamedTuple):
    """What is kept of a step for as long as a work lives: not its plan, which knows all sequences of it."""

    number: int
    began: float
    ended: float
    duration_s: float


class Phase:
    """Prefill or decode: in which steps, which of them took longest, and what happened."""

    __slots__ = ("events", "first", "last", "num_steps", "slowest")

    def __init__(self) -> None:
        self.num_steps = 0
        self.first: Step | None = None
        self.last: Step | None = None
        self.slowest: Step | None = None
        self.events: list[tuple[str, float, dict[str, AttributeValue]]] = []
        """Their names, times on the engine's clock, and attributes."""

    def add(self, step: Step) -> None:
        self.num_steps += 1
        self.first = self.first or step
        self.last = step
        if self.slowest is None or step.duration_s > self.slowest.duration_s:
            self.slowest = step

    def attributes(self) -> dict[str, AttributeValue]:
        found: dict[str, AttributeValue] = {Attribute.NUM_STEPS: self.num_steps}
        if self.first is not None and self.last is not None:
            found |= {Attribute.FIRST_STEP: self.first.number, Attribute.LAST_STEP: self.last.number}
        return found

    def all_events(self) -> list[tuple[str, float, dict[str, AttributeValue]]]:
        """Return them in the order of their times, with that of the slowest step."""
        if (slowest := self.slowest) is None:
            return self.events
        about: dict[str, AttributeValue] = {
            Attribute.STEP: slowest.number,
            Attribute.STEP_DURATION: slowest.duration_s,
        }
        return sorted([*self.events, (Event.SLOWEST_STEP, slowest.began, about)], key=lambda event: event[1])


class WorkSpans:
    """Follows one sampled work; `begin` returns None for all others, and where nothing is recorded. `now` is on the
    engine's clock."""

    __slots__ = (
        "_arrived_at",
        "_attributes",
        "_cached_tokens",
        "_decode",
        "_finish",
        "_first_at",
        "_is_preempted",
        "_num_preemptions",
        "_num_seen",
        "_num_tokens",
        "_parent",
        "_phase",
        "_prefill",
        "_work",
        "link",
    )

    def __init__(self, parent: Context, work: Work, replica_id: str, now: float) -> None:
        self.link = Link(trace.get_current_span(parent).get_span_context())
        """What steps in which it takes part are linked to: the router's dispatch."""
        self._parent = parent
        self._work = work
        self._arrived_at = now
        self._attributes: dict[str, AttributeValue] = {
            Attribute.REQUEST_ID: work.request_id,
            Attribute.ATTEMPT: work.attempt,
            Attribute.REPLICA: replica_id,
        }
        self._prefill, self._decode = Phase(), Phase()
        self._phase = self._prefill
        """The present one."""
        self._cached_tokens: int | None = None
        self._num_preemptions = 0
        self._is_preempted = False
        self._num_tokens = 0
        """Generated, of the choices that have ended, as the engine says."""
        self._num_seen = 0
        """Generated, as far as `observe` saw."""
        self._first_at: float | None = None
        """When the first of these was seen."""
        self._finish: Finish | None = None

    @classmethod
    def begin(cls, work: Work, replica_id: str, now: float) -> WorkSpans | None:
        if not is_sampled(work.traceparent) or not records():
            return None
        carrier = {"traceparent": work.traceparent, "tracestate": work.tracestate}
        return cls(_PROPAGATOR.extract(carrier), work, replica_id, now)

    def took_part(self, step: Step, *, samples: bool) -> None:
        """It was computed in this step, once for all its choices; `samples`: a token of it was drawn."""
        if self._is_preempted:
            self._is_preempted = False
            self._phase.events.append((Event.READMITTED, step.began, {Attribute.STEP: step.number}))
        self._phase.add(step)
        if samples:
            self._phase = self._decode

    def preempted(self, num_preemptions: int, step: Step) -> None:
        """By this step one of its choices had given its blocks up so many times."""
        if num_preemptions > self._num_preemptions:
            self._num_preemptions, self._is_preempted = num_preemptions, True
            self._phase.events.append((Event.PREEMPTED, step.began, {Attribute.STEP: step.number}))

    def observe(self, delta: TokenDelta, now: float) -> None:
        """Account for a first delta, or for the last one of a choice; that which decoded longest tells the times. Of an
        engine that does not say what it generated and when, for each."""
        if delta.num_cached_tokens is not None:
            self._cached_tokens = delta.num_cached_tokens
        if delta.token_ids:
            self._num_seen += len(delta.token_ids)
            self._first_at = self._first_at or now
        finish = delta.finish
        if finish is not None:
            self._num_tokens += finish.num_tokens
            if self._finish is None or finish.decode_s >= self._finish.decode_s:
                self._finish = finish

    def end(self, now: float) -> None:
        """Make the spans of the phases that this work reached. Call once, when its last choice has finished."""
        finish = self._finish
        assert finish is not None
        to_ns = time.time_ns() - round(now * _NS)  # from the engine's clock to the world's
        begin, middle, end = self._times(finish, now)
        error: dict[str, AttributeValue] = {}
        if finish.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            error = {Attribute.ERROR_TYPE: finish.error_reason or finish.reason.value}
        if self._cached_tokens is None:
            self._span(Span.ENGINE_QUEUE, self._arrived_at, end, error, to_ns=to_ns)
            return
        self._span(Span.ENGINE_QUEUE, self._arrived_at, begin, {}, to_ns=to_ns)
        num_tokens = self._num_tokens or self._num_seen
        has_decoded = num_tokens > 0 or self._phase is self._decode
        about = self._about_prefill() | ({} if has_decoded else error)
        self._span(Span.PREFILL, begin, middle, about, self._prefill, to_ns=to_ns)
        if has_decoded:
            about = {Attribute.OUTPUT_TOKENS: num_tokens, Attribute.NUM_PREEMPTIONS: finish.num_preemptions}
            about |= error or {Attribute.FINISH_REASONS: (finish.reason.value,)}
            self._span(Span.DECODE, middle, end, about, self._decode, to_ns=to_ns)

    def _times(self, finish: Finish, now: float) -> tuple[float, float, float]:
        """Return when prefill began, when decode did, and when that ended."""
        if finish.ended_at is not None:
            middle = finish.ended_at - finish.decode_s
            return middle - finish.prefill_s, middle, finish.ended_at
        # The engine did not come to say it, being broken or closed, or it never does.
        first = self._prefill.first
        begin = self._arrived_at if first is None else first.began
        return begin, now if self._first_at is None else self._first_at, now

    def _about_prefill(self) -> dict[str, AttributeValue]:
        work, cached = self._work, self._cached_tokens
        assert cached is not None
        about: dict[str, AttributeValue] = {Attribute.CACHED_INPUT_TOKENS: cached}
        if isinstance(work, GenerateWork):
            about[Attribute.INPUT_TOKENS] = len(work.prompt)
            if work.received:
                about[Attribute.RECEIVED_TOKENS] = sum(map(len, work.received))
        return about

    def _span(
        self,
        name: str,
        began: float,
        ended: float,
        attributes: dict[str, AttributeValue],
        phase: Phase | None = None,
        *,
        to_ns: int,
    ) -> None:
        steps = {} if phase is None else phase.attributes()
        span = _TRACER.start_span(
            name,
            context=self._parent,
            start_time=round(began * _NS) + to_ns,
            attributes=self._attributes | steps | attributes,
        )
        if phase is self._prefill and self._cached_tokens:
            span.add_event(
                Event.CACHE_HIT, {Attribute.CACHED_INPUT_TOKENS: self._cached_tokens}, round(began * _NS) + to_ns
            )
        for event, at, about in phase.all_events() if phase is not None else ():
            span.add_event(event, about, round(at * _NS) + to_ns)
        span.end(end_time=round(max(began, ended) * _NS) + to_ns)


def records() -> bool:
    """Whether this process has a provider that does something with spans."""
    is_none_given = isinstance(_TRACER, trace.ProxyTracer)
    return not (is_none_given and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider))


def is_sampled(traceparent: str) -> bool:
    """Say whether a W3C traceparent is there and has its sampled flag set. A malformed one is not."""
    flags = traceparent[53:55]
    return len(flags) == 2 and flags[1] in "13579bdf"
