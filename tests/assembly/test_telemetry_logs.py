"""Log lines: the ids that join them to requests and traces, nothing unforeseen, and no flood of an exporter's."""

from __future__ import annotations

import json
import logging

import pytest

from cluster import telemetry_logs
from cluster.config_sections import LogConfig

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
EXTRA = {"request_id": "r-1", "traceparent": f"00-{TRACE}-{SPAN}-01", "prompt": "secret", "request": {"tokens": 3}}


def start(**log: str) -> logging.Logger:
    telemetry_logs.start_logging(LogConfig(**log), "router")  # type: ignore[arg-type]
    return logging.getLogger("router.somewhere")


def test_a_json_line_has_the_ids_of_its_request_and_trace(capsys: pytest.CaptureFixture[str]) -> None:
    logger = start(format="json")
    logger.info("it has ended", extra=EXTRA)
    logger.info("nobody's", extra={"traceparent": "", "request_id": None})
    one, other = map(json.loads, capsys.readouterr().err.splitlines())
    assert one.keys() - other.keys() == {"request_id", "trace_id", "span_id", "request"}
    assert (one["request_id"], one["trace_id"], one["span_id"]) == ("r-1", TRACE, SPAN)
    assert one["request"] == {"tokens": 3}
    assert "secret" not in str(one)


def test_a_plain_line_ends_with_them(capsys: pytest.CaptureFixture[str]) -> None:
    start().info("it has ended", extra=EXTRA)
    line = capsys.readouterr().err
    assert line.endswith(f"router.somewhere: it has ended request_id=r-1 trace_id={TRACE}\n")
    start().info("request=r-1 has ended", extra=EXTRA)
    assert capsys.readouterr().err.endswith(f"request=r-1 has ended trace_id={TRACE}\n")


def test_an_id_begins_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    start().info("it has ended", extra={"request_id": "a\n2026 ERROR router"})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith('request_id="a\\n2026 ERROR router"')


def test_an_exception_is_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    logger = start(format="json")
    try:
        raise ValueError("no\nway")
    except ValueError:
        logger.exception("it failed", extra={"request_id": "r-2"})
    line = json.loads(capsys.readouterr().err)
    assert "ValueError: no\nway" in line["exception"]
    assert line["request_id"] == "r-2"


def test_an_exporter_says_once_a_minute_what_is_wrong(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start()
    exporter = logging.getLogger("opentelemetry.exporter.somewhere")

    def try_again(number: int) -> str:
        exporter.error("no collector: try %d", number)
        return capsys.readouterr().err

    assert "try 0" in try_again(0)
    assert try_again(1) == ""
    monkeypatch.setattr(telemetry_logs, "QUIET_S", 0.0)
    assert "try 2" in try_again(2)
    exporter.warning("it will be tried again")
    assert capsys.readouterr().err == ""
