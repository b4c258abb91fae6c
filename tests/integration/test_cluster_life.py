"""How a cluster comes and goes: refusals before anything starts, attaching to a Ray of others, draining."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import ClusterProcess
from tests.integration.calls import connected, generate, request
from workers.fake import fake_continuation

ROOT = Path(__file__).parents[2]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def octavo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_port_in_use_is_noticed_although_routers_share_ports() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = octavo("serve", "--model", "fake", "--engine", "fake", "--port", str(port))
    assert (ended.returncode, ended.stdout) == (4, "")
    assert f"serve.port {port} on 127.0.0.1 cannot be bound" in ended.stderr


def test_a_corrupt_model_ends_the_start_with_its_reason(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF" + b"\xff" * 100)
    ended = octavo("serve", "--model", str(model), "--port", "0")
    assert (ended.returncode, ended.stdout) == (3, "")
    assert "model.gguf" in ended.stderr
    assert "version" in ended.stderr


def test_listening_beyond_loopback_must_be_asked_for() -> None:
    ended = octavo("serve", "--host", "0.0.0.0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "serve.host" in ended.stderr
    assert "--insecure" in ended.stderr


@pytest.fixture
def other_ray() -> Iterator[ClusterProcess]:
    ray = ClusterProcess(
        [str(ROOT / "tests/integration/other_ray.py"), str(ROOT / "deploy/octavo.yaml")],
        {"PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        yield ray.await_ready()
    finally:
        ray.clean_up()


@pytest.mark.cluster
async def test_attached_to_a_ray_of_others_it_drains_and_takes_only_itself_away(other_ray: ClusterProcess) -> None:
    cluster = ClusterProcess.serve(
        *("--ray-address", other_ray.address, "--model", "fake", "--engine", "fake"),
        OCTAVO_ENGINE__FAKE_STEP_S="0.02",
        OCTAVO_ROUTER__DRAIN_GRACE_S="20",
    )
    try:
        cluster.await_ready()
        begun = asyncio.Event()
        async with connected(cluster.address) as channel:
            running = asyncio.create_task(generate(channel, request([5, 6, 7], 150), on_tokens=begun.set))
            await begun.wait()
            cluster.signal()
            async for health in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30):
                if health.status == NOT_SERVING:
                    break
            late = await generate(channel, request([5], 5))
            assert not running.done()
            answer = await running
        assert late.code is grpc.StatusCode.UNAVAILABLE
        assert answer.code is grpc.StatusCode.OK
        assert answer.tokens == fake_continuation([5, 6, 7], 150, VOCAB_SIZE)
        assert await asyncio.to_thread(cluster.stop) == 0
    finally:
        cluster.clean_up()
    assert other_ray.process.poll() is None
    other_ray.signal()
    assert other_ray.await_exit() == 0
    end = json.loads((other_ray.directory / "stdout").read_text().splitlines()[-1])
    assert end == {"event": "end", "nodes": 1, "applications": []}
    assert other_ray.left() == {}
