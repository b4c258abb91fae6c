"""Sets up tracing and logging in one process, from the OTEL_* variables of the OpenTelemetry specification.

Spans leave over OTLP/gRPC only when OTEL_TRACES_EXPORTER or OTEL_EXPORTER_OTLP_(TRACES_)ENDPOINT says so; without, and
with OTEL_SDK_DISABLED=true, nothing is set up and the API's no-op tracer costs nothing. The sampler is that of
OTEL_TRACES_SAMPLER. Export runs in a thread of its own behind a bounded queue that drops, so a dead collector neither
slows a request nor grows memory. Metrics are not exported yet. Prompt text is never logged, here or elsewhere.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable, Mapping

from cluster.config_sections import LogConfig
from workers.errors import ConfigError

STOP_TIMEOUT_S = 2.0
"""How long a process waits for its last spans to leave."""
_PACKAGES = ("cluster", "router", "workers", "octavo")


def start(role: str, environ: Mapping[str, str], log: LogConfig) -> Callable[[], None]:
    """Set up logging and tracing for a process that is "router", "worker" or "client".

    Returns what to call when the process ends: it flushes, within `STOP_TIMEOUT_S`. Raises ConfigError when an exporter
    is asked for that is not installed or not known.
    """
    start_logging(log, role)
    if not _wants_traces(environ):
        return _nothing
    try:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"traces are to be exported, but {error.name} is not installed: pip install octavo[otel]"
        ) from error
    resource = Resource.create({"service.name": f"octavo-{role}"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)

    def stop() -> None:
        flusher = threading.Thread(target=provider.shutdown, name="octavo-flush", daemon=True)
        flusher.start()
        flusher.join(STOP_TIMEOUT_S)

    return stop


def start_logging(log: LogConfig, role: str) -> None:
    """Send the log records of our packages to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter(f"%(asctime)s %(levelname)s {role}[%(process)d] %(name)s: %(message)s")
    handler.setFormatter(_JsonLines(role) if log.format == "json" else plain)
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(log.level.upper())
        logger.propagate = False


class _JsonLines(logging.Formatter):
    """One JSON object a line; what a caller gave as `extra` is not taken, so nothing unforeseen is written."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "role": self._role,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _wants_traces(environ: Mapping[str, str]) -> bool:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if exporter not in ("", "none", "otlp"):
        raise ConfigError(f"OTEL_TRACES_EXPORTER must be otlp or none, is {exporter!r}")
    protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    wanted = exporter == "otlp" or (exporter == "" and bool(endpoint))
    if wanted and protocol != "grpc":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc, is {protocol!r}")
    return wanted


def _nothing() -> None:
    """There is nothing to flush."""
