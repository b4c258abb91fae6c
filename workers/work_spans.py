"""What a replica adds to a request's trace: `octavo.prefill` and `octavo.decode`, made when the work has ended.

Uses the OpenTelemetry API only. The engine measures durations; here they become spans with explicit times under the
router's dispatch span. A work whose parent was not sampled costs one look at a string.
"""

from __future__ import annotations

import time

from octavo.names import Attribute, Span
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from workers.types import Finish, FinishReason, TokenDelta, Work

_TRACER = trace.get_tracer("octavo.workers")
_PROPAGATOR = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class WorkSpans:
    """Follows one sampled work; `begin` returns None for all others."""

    __slots__ = ("_attributes", "_cached_tokens", "_finish", "_output_tokens", "_parent", "_started_ns")

    def __init__(self, parent: Context, work: Work, replica_id: str) -> None:
        self._parent = parent
        self._started_ns = time.time_ns()
        self._attributes: dict[str, AttributeValue] = {
            Attribute.REQUEST_ID: work.request_id,
            Attribute.ATTEMPT: work.attempt,
            Attribute.REPLICA: replica_id,
        }
        self._cached_tokens: int | None = None
        self._output_tokens = 0
        self._finish: Finish | None = None

    @classmethod
    def begin(cls, work: Work, replica_id: str) -> WorkSpans | None:
        if not is_sampled(work.traceparent):
            return None
        carrier = {"traceparent": work.traceparent, "tracestate": work.tracestate}
        return cls(_PROPAGATOR.extract(carrier), work, replica_id)

    def observe(self, delta: TokenDelta) -> None:
        """Account for a delta; the choice that decoded longest tells the times."""
        if delta.num_cached_tokens is not None:
            self._cached_tokens = delta.num_cached_tokens
        self._output_tokens += len(delta.token_ids)
        finish = delta.finish
        if finish is not None and (self._finish is None or finish.decode_s >= self._finish.decode_s):
            self._finish = finish

    def end(self, prompt_tokens: int) -> None:
        """Make the spans of the phases that this work reached. Call once, when its last choice has finished."""
        finish = self._finish
        assert finish is not None
        if self._cached_tokens is None:
            return
        begin = self._started_ns + round(finish.queue_s * _NS)
        middle = begin + round(finish.prefill_s * _NS)
        end = middle + round(finish.decode_s * _NS)
        self._span(
            Span.PREFILL,
            begin,
            middle,
            {Attribute.INPUT_TOKENS: prompt_tokens, Attribute.CACHED_INPUT_TOKENS: self._cached_tokens},
        )
        if self._output_tokens:
            attributes: dict[str, AttributeValue] = {
                Attribute.OUTPUT_TOKENS: self._output_tokens,
                Attribute.NUM_PREEMPTIONS: finish.num_preemptions,
            }
            if finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
                attributes[Attribute.FINISH_REASONS] = (finish.reason.value,)
            else:
                attributes[Attribute.ERROR_TYPE] = finish.error_reason or finish.reason.value
            self._span(Span.DECODE, middle, end, attributes)

    def _span(self, name: str, start_ns: int, end_ns: int, attributes: dict[str, AttributeValue]) -> None:
        span = _TRACER.start_span(
            name, context=self._parent, start_time=start_ns, attributes=self._attributes | attributes
        )
        span.end(end_time=end_ns)


def is_sampled(traceparent: str) -> bool:
    """Say whether a W3C traceparent is there and has its sampled flag set. A malformed one is not."""
    flags = traceparent[53:55]
    return len(flags) == 2 and flags[1] in "13579bdf"
