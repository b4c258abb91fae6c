"""What the router's back adds to a request's trace: `octavo.queue`, and `octavo.dispatch` with the placement decision.

Uses the OpenTelemetry API only. A dispatch lasts from the decision to the end of the attempt, so that the replica's
spans lie within it; its context travels with the work. What left the queue together is a span `octavo.batch` of its
own, linked to the dispatch of each sampled request. A request whose parent was not sampled costs one look at a string,
and its context is passed on as it came.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from octavo.names import Attribute, Event, Reason
from octavo.names import Span as SpanName
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router.types import Attempt, BatchShape, Decision, Request
from workers.errors import OctavoError

_TRACER = trace.get_tracer("octavo.router")
_PROPAGATOR = TraceContextTextMapPropagator()
_NS = 1_000_000_000


class DispatchSpans:
    """Follows one sampled request through queue and dispatches; `begin` returns None for all others, and where nothing
    is recorded."""

    __slots__ = ("_dispatch", "_parent", "_queue", "_request", "link", "router_id")

    def __init__(self, request: Request, router_id: str) -> None:
        carrier = {"traceparent": request.traceparent, "tracestate": request.tracestate}
        self._request = request
        self.router_id = router_id
        self.link: Link | None = None
        """To the last dispatch."""
        self._parent: Context = _PROPAGATOR.extract(carrier)
        self._dispatch: Span | None = None
        self._queue: Span | None = self._start_queue()

    @classmethod
    def begin(cls, request: Request, router_id: str) -> DispatchSpans | None:
        if not _is_sampled(request.traceparent):
            return None
        spans = cls(request, router_id)
        return spans if spans.is_recording else None

    @property
    def is_recording(self) -> bool:
        """Whether anybody will see these."""
        return self._queue is not None and self._queue.is_recording()

    def dispatched(self, attempt: Attempt) -> tuple[str, str]:
        """End the queue span, begin the dispatch; return the traceparent and tracestate for the work."""
        assert self._queue is not None
        wait, decision = attempt.wait, attempt.decision
        if wait.no_replica_s:
            self._queue.set_attribute(Attribute.WAIT_NO_REPLICA, wait.no_replica_s)
        if wait.full_s:
            self._queue.set_attribute(Attribute.WAIT_FULL, wait.full_s)
        now_ns = time.time_ns()
        self._queue.end(now_ns)
        self._queue = None
        self._dispatch = _TRACER.start_span(
            SpanName.DISPATCH,
            context=self._parent,
            start_time=now_ns,
            links=() if self.link is None else (self.link,),
            attributes={
                Attribute.REQUEST_ID: self._request.request_id,
                Attribute.ATTEMPT: decision.attempt,
                Attribute.REPLICA: decision.replica,
                Attribute.RULE: decision.rule,
                Attribute.MATCHED_TOKENS: decision.matched_tokens,
                Attribute.CANDIDATES: _candidates(decision),
                Attribute.BATCH_ID: attempt.batch.batch_id,
            },
        )
        self.link = Link(self._dispatch.get_span_context())
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self._dispatch, self._parent))
        return carrier.get("traceparent", self._request.traceparent), carrier.get("tracestate", "")

    def requeued(self, reason: str, num_received: int) -> None:
        """The attempt was lost, and what is left of the answer, after so many tokens, waits for another one."""
        self._end_dispatch(reason)
        self._queue = self._start_queue()
        self._queue.add_event(Event.RESUMED, {Attribute.ERROR_TYPE: reason, Attribute.RECEIVED_TOKENS: num_received})

    def ended(self, error: OctavoError | None) -> None:
        reason = error.reason if error is not None else None
        self._end_dispatch(reason)
        if self._queue is not None:
            if reason is not None:
                _fail(self._queue, reason)
            self._queue.end()
            self._queue = None

    def _start_queue(self) -> Span:
        return _TRACER.start_span(
            SpanName.QUEUE,
            context=self._parent,
            attributes={
                Attribute.REQUEST_ID: self._request.request_id,
                Attribute.ROUTER: self.router_id,
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


def tell_batch(batch: BatchShape, members: Sequence[DispatchSpans], duration_s: float) -> None:
    """Make the span of a batch that was sent just now, which took `duration_s`. `members`: the sampled ones, at least
    one."""
    now_ns = time.time_ns()
    span = _TRACER.start_span(
        SpanName.BATCH,
        context=Context(),
        start_time=now_ns - round(duration_s * _NS),
        links=[member.link for member in members if member.link is not None],
        attributes={
            Attribute.BATCH_ID: batch.batch_id,
            Attribute.ROUTER: members[0].router_id,
            Attribute.BATCH_REQUESTS: batch.num_requests,
            Attribute.BATCH_TOKENS: batch.num_tokens,
        },
    )
    span.end(end_time=now_ns)


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
                "recent": candidate.recent_tokens,
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
