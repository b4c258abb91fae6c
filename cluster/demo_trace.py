"""The spans of the demo's cluster: a small OTLP/gRPC collector in this process, and one trace as a tree for people.

Needs octavo[otel], as whoever sends spans does; `collecting` does without where it is not installed. Where the user has
a collector of their own, or wants no traces, theirs is left alone and nothing is collected here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import grpc
from octavo.names import Attribute
from octavo.names import Span as SpanName

if TYPE_CHECKING:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )

POLL_S = 0.05
EXPORT_DELAY_MS = 200
"""Between a span's end and its leaving; OpenTelemetry's own default is 5 s."""
_SERVICE = "opentelemetry.proto.collector.trace.v1.TraceService"
_NEEDED = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc", "opentelemetry.proto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Ids are hex; times are nanoseconds since 1970."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Branch:
    """A span and what happened within it, in the order of time."""

    span: Span
    children: tuple[Branch, ...]


class Collector:
    """Serves from its making to `stop`, on loopback."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb

        self._spans: list[Span] = []
        self._lock = threading.Lock()
        self._response = pb.ExportTraceServiceResponse
        export = grpc.unary_unary_rpc_method_handler(
            self._export,
            request_deserializer=pb.ExportTraceServiceRequest.FromString,
            response_serializer=pb.ExportTraceServiceResponse.SerializeToString,
        )
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=2))
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, {"Export": export})])
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    @property
    def variables(self) -> dict[str, str]:
        """What sends a process's spans here."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": self.endpoint,
            "OTEL_METRICS_EXPORTER": "none",
            "OTEL_BSP_SCHEDULE_DELAY": str(EXPORT_DELAY_MS),
        }

    def await_trace(self, trace_id: str, is_whole: Callable[[Sequence[Span]], bool], timeout_s: float) -> list[Span]:
        """Return the spans of a trace once they are all there, or those that are after `timeout_s`. Blocks."""
        end = time.monotonic() + timeout_s
        while not is_whole(spans := self._of(trace_id)) and time.monotonic() < end:
            time.sleep(POLL_S)
        return spans

    def stop(self) -> None:
        self._server.stop(0).wait()

    def _of(self, trace_id: str) -> list[Span]:
        with self._lock:
            return [span for span in self._spans if span.trace_id == trace_id]

    def _export(self, request: ExportTraceServiceRequest, _: grpc.ServicerContext) -> ExportTraceServiceResponse:
        with self._lock:
            self._spans += _spans(request)
        return self._response()


@contextmanager
def collecting(environ: Mapping[str, str]) -> Iterator[Collector | None]:
    """A collector for the scope; None where `environ` has another one or wants none, or OpenTelemetry's SDK is not
    installed."""
    is_set = any(name.startswith(("OTEL_EXPORTER_OTLP", "OTEL_TRACES", "OTEL_SDK")) for name in environ)
    if is_set or not all(map(_is_installed, _NEEDED)):
        yield None
        return
    collector = Collector()
    try:
        yield collector
    finally:
        collector.stop()


def tree(spans: Sequence[Span]) -> list[Branch]:
    """Return the spans below those whose parent is not among them; each span once."""
    ids = {span.span_id for span in spans}
    below: dict[str, list[Span]] = {}
    for span in sorted(spans, key=lambda span: (span.start_ns, span.name)):
        below.setdefault(span.parent_id if span.parent_id in ids else "", []).append(span)

    def branch(span: Span) -> Branch:
        return Branch(span, tuple(map(branch, below.get(span.span_id, ()))))

    return [branch(span) for span in below.get("", ())]


def has_moved(spans: Sequence[Span]) -> bool:
    """Whether these are all the spans of a request that a second replica has ended: it goes on until its decode."""
    dispatches = [span for span in spans if span.name == SpanName.DISPATCH]
    last = max(dispatches, key=lambda span: int(span.attributes[Attribute.ATTEMPT]), default=None)
    if last is None or last.attributes[Attribute.ATTEMPT] == 1 or not any(map(_is_request, spans)):
        return False
    return any(span.name == SpanName.DECODE and span.parent_id == last.span_id for span in spans)


def outline(branches: Sequence[Branch]) -> list[str]:
    """Return the tree as lines, each with its span's name, how long it took, and what it tells."""
    rows = [row for branch in branches for row in _rows(branch, branch, "", "")]
    widths = [max(map(len, column)) for column in zip(*(row[:2] for row in rows), strict=True)]
    return [f"{name:<{widths[0]}}  {took:>{widths[1]}}  {told}".rstrip() for name, took, told in rows]


def _rows(branch: Branch, root: Branch, first: str, rest: str) -> Iterator[tuple[str, str, str]]:
    """`first` is drawn before the branch's own name, `rest` before those below it."""
    span = branch.span
    yield f"{first}{span.name}", _duration((span.end_ns - span.start_ns) / 1e9), _told(branch, root)
    for place, child in enumerate(branch.children, start=1):
        is_last = place == len(branch.children)
        yield from _rows(child, root, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))


def _told(branch: Branch, root: Branch) -> str:
    """Say for people what a span's attributes say."""
    said, name = branch.span.attributes, branch.span.name
    if _is_request(branch.span):
        return f"{said.get(Attribute.OUTPUT_TOKENS, '?')} tokens, through router {str(said.get(Attribute.ROUTER))[-8:]}"
    if name == SpanName.DISPATCH:
        text = f"attempt {said[Attribute.ATTEMPT]} on replica {str(said[Attribute.REPLICA])[-8:]}"
        if Attribute.ERROR_TYPE in said:
            text += f": {said[Attribute.ERROR_TYPE]}"
            return text if branch.children else f"{text}; the replica's own spans died with it"
        num_before = _tokens_before(branch, root)
        return f"{text}: goes on after token {num_before}" if num_before else text
    if name == SpanName.PREFILL:
        return f"{said[Attribute.CACHED_INPUT_TOKENS]} of {said[Attribute.INPUT_TOKENS]} prompt tokens from its cache"
    if name == SpanName.DECODE:
        return f"{said[Attribute.OUTPUT_TOKENS]} tokens"
    return ""


def _tokens_before(dispatch: Branch, root: Branch) -> int:
    """How many tokens of the answer there were when `dispatch`, its last one, began."""
    total = root.span.attributes.get(Attribute.OUTPUT_TOKENS)
    own = [
        child.span.attributes[Attribute.OUTPUT_TOKENS]
        for child in dispatch.children
        if child.span.name == SpanName.DECODE
    ]
    return int(total) - sum(own) if total is not None and own else 0


def _is_request(span: Span) -> bool:
    return span.name in {SpanName.GENERATE, SpanName.SESSION_REQUEST}


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else "< 10 ms"


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of a package above it
        return False


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        about = {item.key: item.value.string_value for item in resource.resource.attributes}
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Span(
                    service=about.get("service.name", ""),
                    name=span.name,
                    trace_id=span.trace_id.hex(),
                    span_id=span.span_id.hex(),
                    parent_id=span.parent_span_id.hex(),
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                    attributes={item.key: _value(item.value) for item in span.attributes},
                )


def _value(value: Any) -> Any:
    """Return what an OTLP AnyValue has; of a list its values."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return None if kind is None else getattr(value, kind)
