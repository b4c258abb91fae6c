"""The log lines of one process: for people, or one JSON object a line with the ids that join it to requests and traces.

Of what a caller gives as `extra` only `KNOWN` is taken, so nothing unforeseen is written. What is in `request` the
caller answers for: prompt text is put there only where the configuration asks for it.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any, Final

from cluster.config_sections import LogConfig

PACKAGES: Final = ("cluster", "router", "workers", "octavo")
KNOWN: Final = ("request_id", "traceparent", "request")
"""`request`: what there is to tell of one, by names; in JSON only, a message says it in words."""
EXPORTERS: Final = "opentelemetry"
QUIET_S: Final = 60.0
"""An exporter whose collector is gone says so this often, and not at each try."""


def start_logging(log: LogConfig, role: str) -> None:
    """Send the log records of our packages to stderr, and those of exporters, but no flood of them."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(role) if log.format == "json" else PlainLines(role))
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(log.level.upper())
        logger.propagate = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(role) if log.format == "json" else PlainLines(role))
    handler.addFilter(Seldom())
    exporters = logging.getLogger(EXPORTERS)
    exporters.handlers = [handler]
    exporters.setLevel(logging.ERROR)
    exporters.propagate = False


class PlainLines(logging.Formatter):
    """A line for people; ids that it does not have in it stand at its end. Clients name requests as they like, and must
    not begin a line with it."""

    def __init__(self, role: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {role}[%(process)d] %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the method of logging.Formatter
        line = super().formatMessage(record)
        told = _told(record)
        ids = ((name, _word(told[name])) for name in ("request_id", "trace_id") if name in told)
        return " ".join([line, *(f"{name}={value}" for name, value in ids if value not in line)])


class JsonLines(logging.Formatter):
    """One JSON object a line."""

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
            **_told(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class Seldom(logging.Filter):
    """Lets a message of one place in the code pass every `QUIET_S`."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[tuple[str, int], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        place = (record.pathname, record.lineno)
        if record.created - self._said_at.get(place, float("-inf")) < QUIET_S:
            return False
        self._said_at[place] = record.created
        return True


def _word(value: str) -> str:
    return value if value.isprintable() and not any(each in value for each in " ='\"") else json.dumps(value)


def _told(record: logging.LogRecord) -> dict[str, Any]:
    """Return what a record says beside its message."""
    told: dict[str, Any] = {}
    request_id, traceparent, request = (getattr(record, name, None) for name in KNOWN)
    if request_id:
        told["request_id"] = request_id
    if traceparent and len(parts := traceparent.split("-")) >= 3:
        told["trace_id"], told["span_id"] = parts[1], parts[2]
    if request:
        told["request"] = request
    return told
