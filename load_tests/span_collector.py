"""An OTLP/gRPC collector that keeps every span with its times, links and events, for those who check whole traces.

What comes is kept as it came and read when it is asked for, so that it costs a cluster beside it as little as can be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

LOOPBACK = "127.0.0.1"
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
EXPORT_DELAY_MS = 500
"""How long spans wait in a process for company."""


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    at_ns: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """Ids are hexadecimal, times nanoseconds since 1970."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: tuple[str, ...]
    """Ids of spans."""
    events: tuple[Event, ...] = ()

    @property
    def duration_s(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


class SpanCollector(trace_service_pb2_grpc.TraceServiceServicer):
    """Serves while entered."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._num_read = 0
        self._spans: list[Span] = []
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=4),
            options=[("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)],
        )
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://{LOOPBACK}:{self._server.add_insecure_port(f'{LOOPBACK}:0')}"

    @property
    def variables(self) -> dict[str, str]:
        """What sends the spans of a process here, all of them."""
        return {
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": self.endpoint,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": str(EXPORT_DELAY_MS),
        }

    def __enter__(self) -> Self:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # the method's name on the wire
        self._messages.append(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def spans(self) -> list[Span]:
        """Return all that came. From one thread."""
        while self._num_read < len(self._messages):
            self._spans += read_spans(self._messages[self._num_read])
            self._num_read += 1
        return list(self._spans)

    def await_spans(self, is_whole: Callable[[list[Span]], bool], timeout_s: float) -> list[Span]:
        """Return all that came once they are whole, or after `timeout_s`. Blocks."""
        give_up = time.monotonic() + timeout_s
        while not is_whole(spans := self.spans()) and time.monotonic() < give_up:
            time.sleep(0.1)
        return spans


def read_spans(request: Any) -> Iterator[Span]:
    """Yield the spans of an ExportTraceServiceRequest."""
    for resource in request.resource_spans:
        service = attributes(resource.resource.attributes).get("service.name", "")
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service=service,
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes=attributes(span.attributes),
                    links=tuple(link.span_id.hex() for link in span.links),
                    events=tuple(
                        Event(event.name, event.time_unix_nano, attributes(event.attributes)) for event in span.events
                    ),
                )


def attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return None if kind is None else getattr(value, kind)
