"""Where everything goes that is told of a request once it has ended: metrics, the records for `octavo trace`, the log.

What is not asked for costs nothing; nothing of it may end a request otherwise.
"""

from __future__ import annotations

import logging
import time

from router.access_log import AccessLog
from router.config import ObserverConfig
from router.metrics import RouterMetrics
from router.request_record import Recorded, RequestRecord
from router.request_records import RequestRecords

_log = logging.getLogger(__name__)


class RequestObserver:
    """`metrics`: None without anybody who records."""

    def __init__(self, config: ObserverConfig, metrics: RouterMetrics | None = None) -> None:
        self.records = RequestRecords(config.max_kept_requests)
        self.metrics = metrics
        self.keeps_prompts = config.logs_prompts and config.logs_requests
        """Whether answers shall keep their prompts until they have ended."""
        self._log = AccessLog(has_texts=config.logs_prompts) if config.logs_requests else None
        self._is_idle = self._log is None and metrics is None and config.max_kept_requests == 0

    def ended(self, answer: Recorded) -> None:
        """Nothing more happens to `answer`."""
        if self._is_idle:
            return
        try:
            record = RequestRecord(answer, time.monotonic())
            self.records.add(record)
            if self.metrics is not None:
                self.metrics.request_ended(record)
            if self._log is not None:
                self._log.write(record, answer)
        except Exception:
            _log.exception("telling of a request has failed")

    def refused(self, model: str, reason: str) -> None:
        """A call or a start was turned away that never became a request."""
        if self.metrics is not None:
            self.metrics.refused(model, reason)
