"""Exporters to a collector over OTLP/gRPC whose failures leave nothing behind. Imports the SDK.

The SDK's own make a cycle of each failure, through its exception's traceback to the batch: as Python looks for garbage
seldom in our processes, a collector that was gone cost a router half a megabyte a second. These wait for a collector
that is away, as long as OTEL_EXPORTER_OTLP_TIMEOUT says, instead of trying again and again, and say once that it is.
"""

from __future__ import annotations

import logging
from typing import Any, Final

import grpc
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

CHANNEL: Final = (("grpc.max_reconnect_backoff_ms", 5_000),)
"""A collector that is there again is found soon."""

_log = logging.getLogger(__name__)


class _Patient:
    """Goes before an exporter of the SDK, and sends what that one has encoded, in one try."""

    _is_away = False

    def _export(self: Any, data: Any) -> Any:
        try:
            request = self._translate_data(data)
            self._client.Export(request=request, metadata=self._headers, timeout=self._timeout, wait_for_ready=True)
        except grpc.RpcError as error:
            if not self._is_away:
                _log.error(
                    "%s do not reach %s: %s %s", self._exporting, self._endpoint, error.code().name, error.details()
                )
            self._is_away = True
            return self._result.FAILURE
        if self._is_away:
            _log.warning("%s reach %s again", self._exporting, self._endpoint)
        self._is_away = False
        return self._result.SUCCESS


class SpanSender(_Patient, OTLPSpanExporter):
    def __init__(self) -> None:
        super().__init__(channel_options=CHANNEL)  # type: ignore[arg-type]  # numbers are right


class MetricSender(_Patient, OTLPMetricExporter):
    def __init__(self) -> None:
        super().__init__(channel_options=CHANNEL)  # type: ignore[arg-type]
