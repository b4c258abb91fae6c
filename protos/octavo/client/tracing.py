"""The client's span of one request, and the W3C context that travels with it. Works without opentelemetry-api too.

With it installed a request is a child of the caller's current span, or of the `traceparent` given for it. Without it
the given `traceparent` is passed on as it is. Sets up no provider and no exporter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from octavo.client.errors import CallError
from octavo.client.exchange import Exchange
from octavo.names import Attribute, Span
from octavo.v1 import inference_service_pb2 as pb

try:
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ImportError:
    HAS_OPENTELEMETRY = False
else:
    HAS_OPENTELEMETRY = True

if TYPE_CHECKING:
    from opentelemetry.context import Context

_SCOPE = "octavo-client"


class RequestSpan:
    """One request's span. `traceparent` and `tracestate` are what its Start carries, `trace_id` is "" if unknown."""

    def __init__(self, request_id: str, request: pb.GenerateRequest, *, traceparent: str, tracestate: str) -> None:
        self.traceparent = traceparent
        self.tracestate = tracestate
        self._span: trace.Span | None = None
        if HAS_OPENTELEMETRY:
            self._open(request_id, request)

    @property
    def trace_id(self) -> str:
        parts = self.traceparent.split("-")
        return parts[1] if len(parts) >= 4 else ""

    def _open(self, request_id: str, request: pb.GenerateRequest) -> None:
        parent: Context | None = None
        propagator = TraceContextTextMapPropagator()
        if self.traceparent:
            parent = propagator.extract({"traceparent": self.traceparent, "tracestate": self.tracestate})
        attributes: dict[str, str | int | float] = {
            Attribute.RPC_SYSTEM: "grpc",
            Attribute.RPC_SERVICE: "octavo.v1.InferenceService",
            Attribute.RPC_METHOD: "Session",
            Attribute.REQUEST_MODEL: request.model,
            Attribute.REQUEST_ID: request_id,
        }
        if request.HasField("max_tokens"):
            attributes[Attribute.REQUEST_MAX_TOKENS] = request.max_tokens
        if request.sampling.HasField("temperature"):
            attributes[Attribute.REQUEST_TEMPERATURE] = request.sampling.temperature
        self._span = trace.get_tracer(_SCOPE).start_span(
            Span.SESSION_REQUEST, context=parent, kind=trace.SpanKind.CLIENT, attributes=attributes
        )
        carrier: dict[str, str] = {}
        propagator.inject(carrier, trace.set_span_in_context(self._span))
        if carrier:
            self.traceparent = carrier["traceparent"]
            self.tracestate = carrier.get("tracestate", "")

    def event(self, name: str, error: CallError) -> None:
        """Note what happened on the way: a lost Session, a retry."""
        if self._span is not None:
            self._span.add_event(name, {Attribute.ERROR_TYPE: error.reason or error.code.name})

    def end(self, exchange: Exchange) -> None:
        """Close the span with the exchange's outcome."""
        if self._span is None:
            return
        error, usage = exchange.error, exchange.usage
        self._span.set_attribute(Attribute.RPC_GRPC_STATUS_CODE, error.code.value[0] if error else 0)
        reasons = [finish.reason.value for finish in exchange.finishes if finish]
        if reasons:
            self._span.set_attribute(Attribute.FINISH_REASONS, reasons)
        if usage is not None:
            self._span.set_attribute(Attribute.INPUT_TOKENS, usage.prompt_tokens)
            self._span.set_attribute(Attribute.OUTPUT_TOKENS, usage.generated_tokens)
            self._span.set_attribute(Attribute.CACHED_INPUT_TOKENS, usage.cached_tokens)
            self._span.set_attribute(Attribute.REPLICA, usage.replica)
        if error is not None:
            self._span.set_attribute(Attribute.ERROR_TYPE, error.reason or error.code.name)
            self._span.set_status(trace.StatusCode.ERROR, str(error))
        self._span.end()
