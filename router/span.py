"""The server span of one request: opened under the client's context, closed with what became of it.

What the front does before and after the back has the request are spans below it, made at the end: `octavo.accept` and
`octavo.deliver`. The OpenTelemetry API only; without an SDK, or when sampled out, the client's context is passed on and
nothing is kept.
"""

from __future__ import annotations

import re
import time

from octavo.names import Attribute, Metadata
from octavo.names import Span as SpanName
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router import status
from router.accounts import Accounts
from router.types import Request
from router.validation import Envelope
from workers.errors import OctavoError

_tracer = trace.get_tracer("octavo.router")
_propagator = TraceContextTextMapPropagator()
_NS = 1_000_000_000
_plain_traceparent = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})").fullmatch

_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that make a server span an error, after the RPC conventions; the others are the client's own affair."""


OPERATIONS = {
    SpanName.EMBED: "embeddings",
    SpanName.SCORE: "score",
    SpanName.RERANK: "rerank",
    SpanName.CLASSIFY: "classify",
}
"""What OpenTelemetry calls what is done, where it is not `GENERATION`."""
GENERATION = "text_completion"


class RequestSpan:
    """`name` is one of `octavo.names.Span`. Must be ended once."""

    __slots__ = (
        "_begun_at",
        "_envelope",
        "_is_recording",
        "_num_prompt",
        "_span",
        "_to_ns",
        "operation",
        "traceparent",
    )

    def __init__(self, name: str, envelope: Envelope, *, model: str, router_id: str) -> None:
        self._envelope = envelope
        self.operation = OPERATIONS.get(name, GENERATION)
        self._num_prompt = 0
        self._begun_at: float | None = None
        self._to_ns = time.time_ns() - time.monotonic_ns()
        """What turns ``time.monotonic``, in nanoseconds, into the time since 1970."""
        self._span = _tracer.start_span(
            name, _parent(envelope), SpanKind.SERVER, start_time=self._ns(envelope.accepted_at)
        )
        own = self._span.get_span_context()
        self.traceparent = (
            f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags & 0xFF:02x}" if own.is_valid else ""
        )
        """What the spans of the router's back and of the replica shall have as their parent."""
        self._is_recording = self._span.is_recording()
        if self._is_recording:
            service, _, method = name.partition("/")
            self._span.set_attributes(
                {
                    Attribute.RPC_SYSTEM: "grpc",
                    Attribute.RPC_SERVICE: service,
                    Attribute.RPC_METHOD: method.partition(" ")[0],
                    Attribute.OPERATION_NAME: self.operation,
                    Attribute.REQUEST_MODEL: model,
                    Attribute.REQUEST_ID: envelope.request_id,
                    Attribute.ROUTER: router_id,
                }
            )

    def accepted(self, request: Request) -> None:
        """The request is valid and this is what it asks."""
        if self._is_recording:
            self._num_prompt = len(request.prompt)
            self._span.set_attributes(
                {
                    Attribute.REQUEST_MODEL: request.model,
                    Attribute.REQUEST_MAX_TOKENS: request.max_tokens,
                    Attribute.REQUEST_TEMPERATURE: request.sampling.temperature,
                    Attribute.PRIORITY: request.priority,
                    Attribute.INPUT_TOKENS: len(request.prompt),
                }
            )

    def begun(self) -> None:
        """The back has the request."""
        if self._is_recording:
            self._begun_at = time.monotonic()

    def end(
        self, error: OctavoError | None, accounts: Accounts, *, num_generated: int, finish_reasons: list[str]
    ) -> None:
        """The terminal was given to the client, or nobody waits for it."""
        if not self._is_recording:
            return
        span, decision, now = self._span, accounts.decision, time.monotonic()
        self._front_spans(error, accounts, now)
        span.set_attributes(
            {
                Attribute.RPC_GRPC_STATUS_CODE: status.code_number(error),
                Attribute.OUTPUT_TOKENS: num_generated,
                Attribute.CACHED_INPUT_TOKENS: accounts.num_cached,
                Attribute.FINISH_REASONS: finish_reasons,
            }
        )
        if accounts.first_token_at is not None:
            first_s = accounts.first_token_at - self._envelope.accepted_at
            span.set_attribute(Attribute.TIME_TO_FIRST_TOKEN, first_s)
        if decision is not None:
            span.set_attributes({Attribute.REPLICA: decision.replica, Attribute.ATTEMPT: decision.attempt})
        if error is not None:
            span.set_attribute(Attribute.ERROR_TYPE, error.reason)
            span.record_exception(error)
            if error.code in _SERVER_FAULTS:
                span.set_status(Status(StatusCode.ERROR, status.message_of(error)))
        span.end(self._ns(now))

    def _front_spans(self, error: OctavoError | None, accounts: Accounts, now: float) -> None:
        """Make the spans of what came before the back had the request, and after."""
        begun_at, over_at = self._begun_at, accounts.over_at
        context, attributes = trace.set_span_in_context(self._span), {Attribute.REQUEST_ID: self._envelope.request_id}
        began_ns = self._ns(self._envelope.accepted_at)
        accept = _tracer.start_span(SpanName.ACCEPT, context, start_time=began_ns, attributes=attributes)
        if accounts.submitted_at is not None:
            accept.set_attribute(Attribute.INPUT_TOKENS, self._num_prompt)
        if begun_at is None and error is not None:
            accept.set_attribute(Attribute.ERROR_TYPE, error.reason)
        accept.end(self._ns(now if begun_at is None else begun_at))
        if begun_at is not None and over_at is not None:
            began_ns = self._ns(over_at)
            deliver = _tracer.start_span(SpanName.DELIVER, context, start_time=began_ns, attributes=attributes)
            deliver.end(self._ns(now))

    def _ns(self, at: float) -> int:
        return self._to_ns + round(at * _NS)


def _parent(envelope: Envelope) -> Context | None:
    """Return the context that the client is in, None without one."""
    if not envelope.traceparent:
        return None
    plain = None if envelope.tracestate else _plain_traceparent(envelope.traceparent)
    if plain is None:
        carrier = {Metadata.TRACEPARENT: envelope.traceparent, Metadata.TRACESTATE: envelope.tracestate}
        return _propagator.extract(carrier)
    # What the propagator would return, at a fraction of its price; every request comes by here, sampled or not.
    trace_id, span_id, flags = (int(digits, 16) for digits in plain.groups())
    parent = SpanContext(trace_id, span_id, is_remote=True, trace_flags=TraceFlags(flags))
    return trace.set_span_in_context(NonRecordingSpan(parent)) if parent.is_valid else Context()
