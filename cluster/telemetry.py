"""Sets up tracing, metrics and logging in one process: the OTEL_* variables of OpenTelemetry, and [telemetry].

Spans and metrics leave over OTLP/gRPC only when OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER or an
OTEL_EXPORTER_OTLP_*ENDPOINT says so; without, no tracer is set up and the API's own costs nothing. Metrics are told as
Prometheus text as well, to whoever asks a port, unless the configuration says no. OTEL_SDK_DISABLED=true turns off all.

Export runs in threads of its own behind bounded queues that drop and count, so that a dead collector neither slows a
request nor grows memory. Registry and providers are ours: what Ray keeps in prometheus_client's own is not told here.
Prompt text is never logged, but for what `log.prompts` asks for.
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from octavo.metrics import SILENT_PROCESSES, SPANS_DROPPED

from cluster.config_sections import LogConfig, TelemetryConfig
from cluster.telemetry_logs import start_logging
from workers.errors import ConfigError

if TYPE_CHECKING:
    from cluster.telemetry_meter import Histograms
    from cluster.telemetry_port import MetricsPort
    from cluster.telemetry_spans import SpanQueue

STOP_TIMEOUT_S: Final = 2.0
"""How long a process waits for its last spans and metrics to leave."""
MAX_LINKS: Final = 4096
"""Of a span, unless OTEL_SPAN_LINK_COUNT_LIMIT says otherwise: a step is linked to all its requests, and the SDK's own
limit is 128."""
LABELS: Final = {"worker": "replica"}
"""What roles are called in the label `process`, where that is another word."""

_log = logging.getLogger(__name__)


class ProcessTelemetry:
    """Implements `workers.types.Process`. `host` is where others of the cluster find what listens on
    `config.metrics_host`."""

    def __init__(self, role: str, environ: Mapping[str, str], config: TelemetryConfig, host: str) -> None:
        self._role, self._config, self._host = role, config, host
        self._stops: list[Callable[[], object]] = []
        self._ports: list[MetricsPort] = []
        self._missed: Callable[[int], object] = lambda _: None
        self._own: Callable[[], str] | None = None
        self.metrics_address = ""
        is_on = environ.get("OTEL_SDK_DISABLED", "").strip().lower() != "true"
        spans = self._start_traces(environ) if is_on and _wants("TRACES", environ) else None
        wants_otlp = is_on and role != "client" and _wants("METRICS", environ)
        if wants_otlp or (is_on and config.metrics):
            self._start_metrics(environ, spans, wants_otlp=wants_otlp)

    def merge(self, instance: str, targets: Callable[[], Mapping[str, str]]) -> str:
        if self._own is None:
            return ""
        from cluster.telemetry_merge import MergedMetrics

        text = MergedMetrics(instance, self._own, targets, self._missed)
        return self._listen(self._config.metrics_port, text, is_shared=True)

    def stop(self) -> None:
        for port in self._ports:
            port.stop()
        threads = [threading.Thread(target=stop, name="octavo-flush", daemon=True) for stop in self._stops]
        for thread in threads:
            thread.start()
        end = time.monotonic() + STOP_TIMEOUT_S
        for thread in threads:
            thread.join(max(end - time.monotonic(), 0.0))

    def _start_traces(self, environ: Mapping[str, str]) -> SpanQueue:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.trace import SpanLimits, TracerProvider

            from cluster.telemetry_exporters import SpanSender
        except ImportError as error:
            raise _missing("traces", error) from error
        from cluster.telemetry_sampler import sampler
        from cluster.telemetry_spans import QueueLimits, SpanQueue

        limits, chosen = QueueLimits.of(environ), sampler(environ)
        limit = {} if "OTEL_SPAN_LINK_COUNT_LIMIT" in environ else {"max_links": MAX_LINKS}
        provider = TracerProvider(chosen, self._resource(), shutdown_on_exit=False, span_limits=SpanLimits(**limit))
        spans = SpanQueue(SpanSender(), limits)
        provider.add_span_processor(spans)
        trace.set_tracer_provider(provider)
        self._stops.append(provider.shutdown)
        return spans

    def _start_metrics(self, environ: Mapping[str, str], spans: SpanQueue | None, *, wants_otlp: bool) -> None:
        from opentelemetry import metrics
        from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
        from opentelemetry.sdk.metrics.export import MetricReader

        from cluster.telemetry_meter import Histograms, QuickMeterProvider

        histograms = Histograms()
        readers: list[MetricReader] = [_otlp_reader(histograms)] if wants_otlp else []
        if self._config.metrics:
            readers.append(self._prometheus_reader(histograms))
        # An exemplar would have every measurement look for the span that it is in, and none is.
        provider = MeterProvider(
            readers, self._resource(), exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False
        )
        quick = QuickMeterProvider(provider, histograms)
        metrics.set_meter_provider(quick)
        self._stops.append(provider.shutdown)
        meter = quick.get_meter("octavo.cluster")

        def dropped(_: Any) -> Sequence[Any]:
            return [metrics.Observation(spans.num_dropped if spans is not None else 0)]

        SPANS_DROPPED.create(meter, dropped)
        if self._role == "router":
            self._missed = SILENT_PROCESSES.create(meter).add
            self._missed(0)
        if self._config.metrics:
            assert self._own is not None
            self.metrics_address = self._listen(0, self._own, is_shared=False)

    def _prometheus_reader(self, histograms: Histograms) -> Any:
        from opentelemetry.exporter.prometheus import PrometheusMetricReader
        from prometheus_client import CollectorRegistry, ProcessCollector

        from cluster.telemetry_meter import collecting
        from cluster.telemetry_text import own_text

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        role, aliases = LABELS.get(self._role, self._role), self._config.vllm_aliases
        self._own = lambda: own_text(registry, role, aliases=aliases)
        return collecting(PrometheusMetricReader, histograms)(scope_info_enabled=False, registry=registry)

    def _listen(self, port: int, text: Callable[[], str], *, is_shared: bool) -> str:
        """Return the address; empty, and a line of the log, if it cannot be: requests are served without metrics."""
        from cluster.telemetry_port import PATH, MetricsPort

        try:
            listening = MetricsPort(self._config.metrics_host, port, text, is_shared=is_shared)
        except OSError as error:
            _log.error("metrics cannot be told at %s, port %d: %s", self._config.metrics_host, port, error)
            return ""
        self._ports.append(listening)
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{listening.port}{PATH}"

    def _resource(self) -> Any:
        from opentelemetry.sdk.resources import Resource

        about = {"service.name": f"octavo-{self._role}", "service.version": importlib.metadata.version("octavo")}
        return Resource.create(about)


def start(
    role: str,
    environ: Mapping[str, str],
    log: LogConfig,
    config: TelemetryConfig | None = None,
    host: str = "",
) -> ProcessTelemetry:
    """Set up logging, traces and metrics for a process that is "router", "worker", "signal" or "client".

    `config`: without one, no metrics are told. `host`: as in `ProcessTelemetry`, if it is not `config.metrics_host`.
    Call `stop` of what is returned when the process ends: it flushes, within `STOP_TIMEOUT_S`. Raises ConfigError when
    an exporter is asked for that is not installed or not known.
    """
    start_logging(log, role)
    config = TelemetryConfig(metrics=False) if config is None else config
    return ProcessTelemetry(role, environ, config, (host or config.metrics_host).strip("[]"))


def _otlp_reader(histograms: Histograms) -> Any:
    try:
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

        from cluster.telemetry_exporters import MetricSender
        from cluster.telemetry_meter import collecting
    except ImportError as error:
        raise _missing("metrics", error) from error
    return collecting(PeriodicExportingMetricReader, histograms)(MetricSender())


def _missing(what: str, error: ImportError) -> ConfigError:
    return ConfigError(f"{what} are to be exported, but {error.name} is not installed: pip install octavo[otel]")


def _wants(signal: str, environ: Mapping[str, str]) -> bool:
    """Whether the variables ask for the export of "TRACES" or "METRICS"."""
    exporter = environ.get(f"OTEL_{signal}_EXPORTER", "").strip()
    if exporter not in ("", "none", "otlp"):
        raise ConfigError(f"OTEL_{signal}_EXPORTER must be otlp or none, is {exporter!r}")
    own = f"OTEL_EXPORTER_OTLP_{signal}"
    protocol = environ.get(f"{own}_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    endpoint = environ.get(f"{own}_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    wanted = exporter == "otlp" or (exporter == "" and bool(endpoint))
    if wanted and protocol != "grpc":
        raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL must be grpc, is {protocol!r}")
    return wanted
