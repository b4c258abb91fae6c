"""The server span of one request: opened under the client's context, closed with what became of it.

The OpenTelemetry API only; without an SDK, or when sampled out, the client's context is passed on and nothing is kept.
"""

from __future__ import annotations

import re

from octavo.names import Attribute, Metadata
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router import status
from router.types import Decision, Request
from router.validation import Envelope
from workers.errors import OctavoError

_tracer = trace.get_tracer("octavo.router")
_propagator = TraceContextTextMapPropagator()
_plain_traceparent = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})").fullmatch

_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that make a server span an error, after the RPC conventions; the others are the client's own affair."""


class RequestSpan:
    """`name` is one of `octavo.names.Span`. Must be ended once."""

    __slots__ = ("_is_recording", "_span", "traceparent")

    def __init__(self, name: str, envelope: Envelope, *, model: str, router_id: str) -> None:
        self._span = _tracer.start_span(name, _parent(envelope), SpanKind.SERVER)
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
                    Attribute.OPERATION_NAME: "text_completion",
                    Attribute.REQUEST_MODEL: model,
                    Attribute.REQUEST_ID: envelope.request_id,
                    Attribute.ROUTER: router_id,
                }
            )

    def accepted(self, request: Request) -> None:
        """The request is valid and this is what it asks."""
        if self._is_recording:
            self._span.set_attributes(
                {
                    Attribute.REQUEST_MODEL: request.model,
                    Attribute.REQUEST_MAX_TOKENS: request.max_tokens,
                    Attribute.REQUEST_TEMPERATURE: request.sampling.temperature,
                    Attribute.PRIORITY: request.priority,
                    Attribute.INPUT_TOKENS: len(request.prompt),
                }
            )

    def end(
        self,
        error: OctavoError | None,
        *,
        num_generated: int,
        num_cached: int,
        finish_reasons: list[str],
        decision: Decision | None,
    ) -> None:
        if not self._is_recording:
            return
        span = self._span
        span.set_attributes(
            {
                Attribute.RPC_GRPC_STATUS_CODE: status.code_number(error),
                Attribute.OUTPUT_TOKENS: num_generated,
                Attribute.CACHED_INPUT_TOKENS: num_cached,
                Attribute.FINISH_REASONS: finish_reasons,
            }
        )
        if decision is not None:
            span.set_attributes({Attribute.REPLICA: decision.replica, Attribute.ATTEMPT: decision.attempt})
        if error is not None:
            span.set_attribute(Attribute.ERROR_TYPE, error.reason)
            span.record_exception(error)
            if error.code in _SERVER_FAULTS:
                span.set_status(Status(StatusCode.ERROR, status.message_of(error)))
        span.end()


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
