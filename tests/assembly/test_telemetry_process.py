"""Telemetry of a whole process, in a process of its own: what is told where, and collectors that do not answer."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.collector import Collector

ROOT = Path(__file__).parents[2]
NUM_SPANS = 15_000
PROGRAM = """
import json, os, resource, sys, threading, time
from octavo.metrics import REQUEST_DURATION, REQUESTS
from opentelemetry import metrics, trace
from prometheus_client import REGISTRY
from cluster import telemetry
from cluster.config_sections import LogConfig, TelemetryConfig
from cluster.telemetry_port import fetch

def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()

config = TelemetryConfig(**json.loads(sys.argv[1]))
process = telemetry.start("router", os.environ, LogConfig(), config)
told = {"address": process.metrics_address, "threads": [thread.name for thread in threading.enumerate()]}
tracer, meter = trace.get_tracer("test"), metrics.get_meter("test")
counter, times = REQUESTS.create(meter), REQUEST_DURATION.create(meter)
before, slowest, n = 0, 0.0, int(sys.argv[2])
for number in range(n):
    if number == n // 3:
        before = resident()
    counter.add(1, {"gen_ai.request.model": "toy"})
    times.record(0.5, {"gen_ai.request.model": "toy"})
    with tracer.start_as_current_span("any", attributes={"number": number, "text": "x" * 100}):
        pass
if process.metrics_address:
    told["text"] = fetch(process.metrics_address, 10)
    told["merged"] = fetch(process.merge("me", lambda: {"gone": "http://127.0.0.1:1/metrics"}), 10)
told["growth"] = resident() - before
began = time.monotonic()
process.stop()
told["stop_s"] = time.monotonic() - began
told["names_in_rays_registry"] = [family.name for family in REGISTRY.collect() if family.name.startswith("octavo")]
print(json.dumps(told))
"""


def run(config: dict[str, Any], num_spans: int, **variables: str) -> dict[str, Any]:
    """Have a process record so many spans and requests; return what it has to tell."""
    command = [sys.executable, "-c", PROGRAM, json.dumps(config), str(num_spans)]
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/protos", "PATH": "/usr/bin:/bin", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = {**json.loads(done.stdout), "log": done.stderr}
    return told


def value(text: str, name: str) -> float:
    line = next(line for line in text.splitlines() if line.startswith(name))
    return float(line.rpartition(" ")[2])


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """A collector that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_metrics_are_told_without_any_collector() -> None:
    told = run({}, 3)
    assert sorted(told["threads"]) == ["MainThread", "octavo-metrics"]
    assert value(told["text"], "octavo_requests_total{") == 3
    assert value(told["text"], "gen_ai_server_request_duration_seconds_sum") == 1.5
    assert value(told["text"], "vllm:e2e_request_latency_seconds_count") == 3
    assert value(told["text"], "octavo_telemetry_dropped_spans_total") == 0
    assert value(told["text"], "process_resident_memory_bytes") > 1e6
    assert 'octavo_telemetry_silent_processes_total{instance="me",process="router"} 1.0' in told["merged"]
    assert told["names_in_rays_registry"] == []
    assert told["log"] == ""


@pytest.mark.parametrize(
    ("config", "variables"),
    [({"metrics": False}, {}), ({}, {"OTEL_SDK_DISABLED": "true"})],
    ids=["not configured", "disabled"],
)
def test_where_nothing_is_asked_for_nothing_runs(config: dict[str, Any], variables: dict[str, str]) -> None:
    told = run(config, 1, **variables)
    assert told["address"] == ""
    assert told["threads"] == ["MainThread"]


def test_a_host_that_is_not_this_machines_costs_the_metrics_alone() -> None:
    told = run({"metrics_host": "192.0.2.1"}, 1)
    assert told["address"] == ""
    assert "metrics cannot be told at 192.0.2.1" in told["log"]


def test_spans_and_metrics_reach_a_collector_before_the_end() -> None:
    with Collector() as collector:
        told = run({}, 5, OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint)
        assert len(collector.named("any")) == 5
        assert {
            "octavo.requests",
            "gen_ai.server.request.duration",
            "octavo.telemetry.dropped_spans",
        } <= collector.metrics()
    assert told["log"] == ""
    assert told["stop_s"] < 10


@pytest.mark.parametrize("kind", ["dead", "silent"])
def test_a_collector_that_does_not_answer_costs_spans_and_nothing_else(kind: str) -> None:
    """Memory stays flat although four times what fits is recorded, what is lost is counted, and the end is not late."""
    with silent() as endpoint:
        told = run(
            {},
            NUM_SPANS,
            OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1" if kind == "dead" else endpoint,
            OTEL_METRICS_EXPORTER="none",
        )
    assert value(told["text"], "octavo_requests_total{") == NUM_SPANS
    assert NUM_SPANS - 2 * 4096 <= value(told["text"], "octavo_telemetry_dropped_spans_total") <= NUM_SPANS
    assert told["growth"] < 16e6
    assert told["stop_s"] < 10
    assert told["log"].count("\n") <= 4
