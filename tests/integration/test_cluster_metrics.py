"""The metrics of a running cluster: every process tells its own, and a router those of all."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.cluster import ClusterProcess
from tests.collector import Collector
from tests.integration.calls import connected, generate, request

pytestmark = pytest.mark.cluster
TIMEOUT_S = 40.0


def test_a_router_tells_the_metrics_of_every_process(fake_cluster: ClusterProcess) -> None:
    """The router, both replicas and octavo-signal, which counts as soon as Serve asks it."""
    end = time.monotonic() + TIMEOUT_S
    while True:
        with urlopen(fake_cluster.ready["metrics"]) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
        sample = families["process_resident_memory_bytes"].samples
        told = {each.labels["instance"]: each.labels["process"] for each in sample}
        # Other tests have replicas of this cluster killed, so that their ids are not those of its start.
        is_whole = sorted(told.values()) == ["replica", "replica", "router", "signal"]
        if is_whole and "octavo_replicas_target" in families:
            break
        assert time.monotonic() < end, told
        time.sleep(0.1)
    assert told["octavo-signal"] == "signal"
    dropped = families["octavo_telemetry_dropped_spans"].samples
    assert {each.labels["instance"] for each in dropped} == told.keys()
    targets = {each.labels["gen_ai_request_model"]: each.value for each in families["octavo_replicas_target"].samples}
    assert targets["fake"] >= 2


async def test_a_request_counts(fake_cluster: ClusterProcess) -> None:
    def count() -> float:
        with urlopen(fake_cluster.ready["metrics"]) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("octavo_requests_total{"))

    before = count()
    async with connected(fake_cluster.address) as channel:
        await generate(channel, request([1, 2, 3], 3))
    end = time.monotonic() + TIMEOUT_S
    while count() <= before:
        assert time.monotonic() < end
        await asyncio.sleep(0.1)


def test_status_says_where(fake_cluster: ClusterProcess) -> None:
    command = [sys.executable, "-m", "cluster.cli", "status", "--address", fake_cluster.address]
    told = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=150, check=True)
    assert json.loads(told.stdout)["router"]["metrics_address"] == fake_cluster.ready["metrics"]


def test_metrics_come_by_otlp_as_well(fake_cluster: ClusterProcess, collector: Collector) -> None:
    """From the replica, the router and octavo-signal."""
    end = time.monotonic() + TIMEOUT_S
    while missing := {"octavo.engine.running", "octavo.queue.requests", "octavo.replicas.target"} - collector.metrics():
        assert time.monotonic() < end, missing
        time.sleep(0.1)


def test_a_metrics_port_in_use_is_noticed_although_routers_share_it() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "cluster.cli", "serve", "--model", "fake", "--engine", "fake", "--port", "0"]
        variables = {**os.environ, "OCTAVO_TELEMETRY__METRICS_PORT": str(port)}
        ended = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=150, check=False)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert f"telemetry.metrics_port {port} on 127.0.0.1 cannot be bound" in ended.stderr
