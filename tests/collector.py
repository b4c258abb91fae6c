"""A tiny OTLP/gRPC collector in the test's process: keeps the spans that it is sent and finds whole traces in them; of
metrics it keeps the names."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import grpc
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from load_tests.span_collector import Span, read_spans

TIMEOUT_S = 60.0


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Serves between `__enter__` and `__exit__`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._metrics: set[str] = set()
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(_Metrics(self._lock, self._metrics), self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.stop(0).wait()

    @contextmanager
    def client_span(self, name: str) -> Iterator[tuple[str, str, str]]:
        """A span of a client, sent to this collector at its end; yields trace id, span id and traceparent."""
        provider = TracerProvider(resource=Resource.create({"service.name": "octavo-client"}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=self.endpoint, insecure=True)
        provider.add_span_processor(SimpleSpanProcessor(exporter))
        with provider.get_tracer("client").start_as_current_span(name) as span:
            carrier: dict[str, str] = {}
            TraceContextTextMapPropagator().inject(carrier)
            context = span.get_span_context()
            yield f"{context.trace_id:032x}", f"{context.span_id:016x}", carrier["traceparent"]
        provider.shutdown()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # the method's name on the wire
        with self._lock:
            self._spans += read_spans(request)
        return trace_service_pb2.ExportTraceServiceResponse()

    def metrics(self) -> set[str]:
        """Return the names of all metrics that came."""
        with self._lock:
            return set(self._metrics)

    def spans(self, trace_id: str) -> list[Span]:
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]

    def named(self, name: str) -> list[Span]:
        """Return the spans of all traces that are called `name`, in the order in which they came."""
        with self._lock:
            return [span for span in self._spans if span.name == name]

    def since(self, number: int = 0) -> list[Span]:
        """Return the spans of all traces, but for the first ones that came."""
        with self._lock:
            return self._spans[number:]

    def await_spans(self, trace_id: str, names: set[str]) -> dict[str, Span]:
        """Return one trace's spans by name, once those called `names` are among them."""
        end = time.monotonic() + TIMEOUT_S
        while True:
            spans = {span.name: span for span in self.spans(trace_id)}
            if names <= spans.keys():
                return spans
            assert time.monotonic() < end, f"of {sorted(names)} only {sorted(spans)} came"
            time.sleep(0.05)


class _Metrics(metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps the names alone."""

    def __init__(self, lock: threading.Lock, names: set[str]) -> None:
        self._lock, self._names = lock, names

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802  # the method's name on the wire
        scopes = (scope for resource in request.resource_metrics for scope in resource.scope_metrics)
        with self._lock:
            self._names.update(metric.name for scope in scopes for metric in scope.metrics)
        return metrics_service_pb2.ExportMetricsServiceResponse()
