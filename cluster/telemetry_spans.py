"""Ended spans on their way out: a bounded queue, a thread that exports it, and a count of what was lost.

Whoever ends a span pays for one append. A collector that is gone, slow or silent keeps the thread busy and nobody
else; what comes while the queue is full is dropped and counted, as is a batch that the exporter did not get rid of. The
limits are those of the OTEL_BSP_* variables. (The SDK's own processor drops as well, but counts nothing, and to it a
step that is linked to 200 requests is a span like any other, although it takes 40 times the memory.)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from workers.errors import ConfigError

LINKS_OF_A_SPAN: Final = 5
"""Links that take as much memory as a span, 3 KB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """In spans without links; one with links counts as several."""

    max_spans: int = 4096
    max_batch: int = 512
    delay_s: float = 5.0
    """How long spans wait for others to leave with, unless a batch is full before."""

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> QueueLimits:
        """Raises ConfigError."""
        max_spans = _number(environ, "OTEL_BSP_MAX_QUEUE_SIZE", cls().max_spans)
        max_batch = _number(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", min(cls().max_batch, max_spans))
        delay_ms = _number(environ, "OTEL_BSP_SCHEDULE_DELAY", round(1000 * cls().delay_s))
        return cls(max_spans=max_spans, max_batch=min(max_batch, max_spans), delay_s=delay_ms / 1000)


class SpanQueue(SpanProcessor):
    """Exports with `exporter`, one batch at a time, on a thread of its own, until `shutdown`."""

    def __init__(self, exporter: SpanExporter, limits: QueueLimits) -> None:
        self._exporter = exporter
        self._limits = limits
        self._spans: deque[ReadableSpan] = deque()
        self._size = 0
        """Of these together, as `QueueLimits` counts."""
        self._changed = threading.Condition(threading.Lock())
        self._is_exporting = self._is_stopping = self._is_hurried = False
        self._num_dropped = 0
        self._thread = threading.Thread(target=self._run, name="octavo-spans", daemon=True)
        self._thread.start()

    @property
    def num_dropped(self) -> int:
        """Spans that were lost so far."""
        return self._num_dropped

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        pass

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        size = _size(span)
        with self._changed:
            if self._is_stopping or (self._spans and self._size + size > self._limits.max_spans):
                self._num_dropped += 1
                return
            was_due, was_empty = self._is_due(), not self._spans
            self._spans.append(span)
            self._size += size
            if was_empty or self._is_due() != was_due:
                self._changed.notify_all()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait until what is queued has left or was lost; return whether it has by then."""
        with self._changed:
            self._is_hurried = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._spans and not self._is_exporting, timeout_millis / 1000)

    def shutdown(self) -> None:
        """Export what is queued and end; an exporter that does not get rid of it decides how long that takes."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()
        self._thread.join()
        self._exporter.shutdown()

    def _run(self) -> None:
        while batch := self._next():
            try:
                is_out = self._exporter.export(batch) is SpanExportResult.SUCCESS
            except Exception:  # an exporter's bug must not end the export of all that follows
                is_out = False
            with self._changed:
                self._num_dropped += 0 if is_out else len(batch)
                batch.clear()  # an exception's traceback may keep it
                self._is_exporting = False
                self._changed.notify_all()

    def _next(self) -> list[ReadableSpan]:
        """Wait for spans and for others that leave with them; none when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._spans or self._is_stopping)
            self._changed.wait_for(self._is_due, self._limits.delay_s)
            batch, size = [], 0
            while self._spans and size < self._limits.max_batch:
                batch.append(self._spans.popleft())
                size += _size(batch[-1])
            self._size -= size
            self._is_exporting = bool(batch)
            self._is_hurried = self._is_hurried and bool(self._spans)
            return batch

    def _is_due(self) -> bool:
        return self._is_stopping or self._is_hurried or self._size >= self._limits.max_batch


def _size(span: ReadableSpan) -> int:
    return 1 + len(span.links) // LINKS_OF_A_SPAN


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ConfigError(f"{name} must be an integer >= 1, is {text!r}")
    return int(text)
