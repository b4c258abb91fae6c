"""What the router's back adds to a request's trace: `octavo.queue`, and `octavo.dispatch` with the placement decision.

Uses the OpenTelemetry API only. A dispatch lasts from the decision to the end of the attempt, so that the replica's
spans lie within it; its context travels with the work. A request whose parent was not sampled costs one look at a
string, and its context is passed on as it came.
"""

from __future__ import annotations

import json
import time

from octavo.names import Attribute, Reason
from octavo.names import Span as SpanName
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router.types import Decision, Request
from workers.errors import OctavoError

_TRACER = trace.get_tracer("octavo.router")
_PROPAGATOR = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class DispatchSpans:
    """Follows one sampled request through queue and dispatches; `begin` returns None for all others."""

    __slots__ = ("_dispatch", "_parent", "_queue", "_request")

    def __init__(self, request: Request, router_id: str, now: float) -> None:
        carrier = {"traceparent": request.traceparent, "tracestate": request.tracestate}
        self._request = request
        self._parent: Context = _PROPAGATOR.extract(carrier)
        self._dispatch: Span | None = None
        self._queue: Span | None = self._start_queue(time.time_ns() - round((now - request.accepted_at) * _NS))
        self._queue.set_attribute(Attribute.ROUTER, router_id)

    @classmethod
    def begin(cls, request: Request, router_id: str, now: float) -> DispatchSpans | None:
        return cls(request, router_id, now) if _is_sampled(request.traceparent) else None

    def dispatched(self, decision: Decision, batch_id: int) -> tuple[str, str]:
        """End the queue span, begin the dispatch; return the traceparent and tracestate for the work."""
        assert self._queue is not None
        self._queue.end()
        self._queue = None
        self._dispatch = _TRACER.start_span(
            SpanName.DISPATCH,
            context=self._parent,
            attributes={
                Attribute.REQUEST_ID: self._request.request_id,
                Attribute.ATTEMPT: decision.attempt,
                Attribute.REPLICA: decision.replica,
                Attribute.RULE: decision.rule,
                Attribute.MATCHED_TOKENS: decision.matched_tokens,
                Attribute.CANDIDATES: _candidates(decision),
                Attribute.BATCH_ID: batch_id,
            },
        )
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._dispatch, self._parent))
        return carrier.get("traceparent", self._request.traceparent), carrier.get("tracestate", "")

    def requeued(self, reason: str) -> None:
        """The attempt was lost, and what is left of the answer waits for another one."""
        self._end_dispatch(reason)
        self._queue = self._start_queue(time.time_ns())

    def ended(self, error: OctavoError | None) -> None:
        reason = error.reason if error is not None else None
        self._end_dispatch(reason)
        if self._queue is not None:
            if reason is not None:
                _fail(self._queue, reason)
            self._queue.end()
            self._queue = None

    def _start_queue(self, start_ns: int) -> Span:
        return _TRACER.start_span(
            SpanName.QUEUE,
            context=self._parent,
            start_time=start_ns,
            attributes={
                Attribute.REQUEST_ID: self._request.request_id,
                Attribute.PRIORITY: self._request.priority,
                Attribute.INPUT_TOKENS: len(self._request.prompt),
            },
        )

    def _end_dispatch(self, reason: str | None) -> None:
        if self._dispatch is not None:
            if reason is not None:
                _fail(self._dispatch, reason)
            self._dispatch.end()
            self._dispatch = None


def _fail(span: Span, reason: str) -> None:
    span.set_attribute(Attribute.ERROR_TYPE, reason)
    # A cancel is nobody's error: a stop string that ends an answer is one, too.
    if reason != Reason.CANCELLED:
        span.set_status(Status(StatusCode.ERROR))


def _candidates(decision: Decision) -> str:
    """As JSON: attributes of spans have no structure."""
    return json.dumps(
        [
            {
                "replica": candidate.replica,
                "matched": candidate.matched_tokens,
                "owed": candidate.owed_tokens,
                "uncached": candidate.uncached_tokens,
                "decode": candidate.decode_tokens,
                "displaced": candidate.displaced_tokens,
                "cost": candidate.cost,
            }
            for candidate in decision.candidates
        ],
        separators=(",", ":"),
    )


def _is_sampled(traceparent: str) -> bool:
    """Say whether a W3C traceparent is there and has its sampled flag set. A malformed one is not."""
    flags = traceparent[53:55]
    return len(flags) == 2 and flags[1] in "13579bdf"
