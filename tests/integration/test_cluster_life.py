"""How a cluster comes and goes: refusals before anything starts, attaching to a Ray of others, draining."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import ClusterProcess
from tests.integration.calls import Answer, await_status, connected, generate, has_ready, request
from workers.fake import fake_continuation

ROOT = Path(__file__).parents[2]
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def octavo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def other_ray() -> Iterator[ClusterProcess]:
    """A Ray of others, which is theirs alone again when the tests are over."""
    ray = ClusterProcess(
        [str(ROOT / "tests/integration/other_ray.py"), str(ROOT / "deploy/octavo.yaml"), str(free_port())],
        {"PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        yield ray.await_ready()
        assert ray.process.poll() is None
        ray.signal()
        assert ray.await_exit() == 0
        end = json.loads((ray.directory / "stdout").read_text().splitlines()[-1])
        assert "octavo-signal-attached" not in end.pop("actors")
        assert end == {"event": "end", "nodes": 1, "applications": []}
        assert ray.left() == {}
    finally:
        ray.clean_up()


async def drain_during(cluster: ClusterProcess, channel: grpc.aio.Channel, *, num_tokens: int) -> asyncio.Task[Answer]:
    """Tell the cluster to stop while an answer runs; return that answer once the cluster is said to drain."""
    begun = asyncio.Event()
    running = asyncio.create_task(generate(channel, request([5, 6, 7], num_tokens), on_tokens=begun.set))
    await begun.wait()
    cluster.signal()
    async for health in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=30):
        if health.status == NOT_SERVING:
            break
    return running


@pytest.mark.cluster
async def test_attached_to_a_ray_of_others_it_drains_and_takes_only_itself_away(other_ray: ClusterProcess) -> None:
    cluster = ClusterProcess.serve(
        *("--ray-address", other_ray.address, "--model", "fake", "--engine", "fake", "--app", "attached"),
        OCTAVO_ENGINE__FAKE_STEP_S="0.02",
        OCTAVO_ROUTER__DRAIN_GRACE_S="20",
    )
    try:
        cluster.await_ready()
        async with connected(cluster.address) as channel:
            running = await drain_during(cluster, channel, num_tokens=150)
            late = await generate(channel, request([5], 5))
            assert not running.done()
            answer = await running
        assert late.code is grpc.StatusCode.UNAVAILABLE
        assert answer.code is grpc.StatusCode.OK
        assert answer.tokens == fake_continuation([5, 6, 7], 150, VOCAB_SIZE)
        assert await asyncio.to_thread(cluster.stop) == 0
    finally:
        cluster.clean_up()


@pytest.mark.cluster
async def test_a_second_signal_does_not_wait_for_running_answers(other_ray: ClusterProcess) -> None:
    cluster = ClusterProcess.serve(
        *("--ray-address", other_ray.address, "--model", "fake", "--engine", "fake"),
        OCTAVO_ENGINE__FAKE_STEP_S="1",
        OCTAVO_ROUTER__DRAIN_GRACE_S="600",
    )
    try:
        cluster.await_ready()
        async with connected(cluster.address) as channel:
            running = await drain_during(cluster, channel, num_tokens=1000)
            cluster.signal()
            assert await asyncio.to_thread(cluster.stop) == 0
            assert not running.done()  # Serve gives it the time to drain that was configured
            running.cancel()
    finally:
        cluster.clean_up()


@pytest.mark.cluster
async def test_serve_deploy_takes_the_file_in_deploy(other_ray: ClusterProcess, tmp_path: Path) -> None:
    """The file as it is, but for the model and the ports; deployed by Ray's own command, and taken away again."""
    port, health_port = free_port(), free_port()
    file = yaml.safe_load((ROOT / "deploy/octavo.yaml").read_text())
    (application,) = file["applications"]
    application["args"] |= {"model": "fake", "engine": {"engine": "fake"}}
    application["args"]["serve"]["port"] = port
    application["args"]["router"] = {"health_port": health_port}
    (tmp_path / "octavo.yaml").write_text(yaml.safe_dump(file))
    dashboard = other_ray.ready["dashboard"]
    command = [Path(sys.executable).with_name("serve"), "deploy", tmp_path / "octavo.yaml", "--address", dashboard]
    await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=150, check=True)
    async with connected(f"127.0.0.1:{port}") as channel:
        await asyncio.wait_for(channel.channel_ready(), 60)
        await await_status(channel, has_ready(2))
        answer = await generate(channel, request([5, 6, 7], 20))
    assert (answer.code, answer.tokens) == (grpc.StatusCode.OK, fake_continuation([5, 6, 7], 20, VOCAB_SIZE))
    async with connected(f"127.0.0.1:{health_port}") as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
    delete = urllib.request.Request(f"{dashboard}/api/serve/applications/", method="DELETE")
    (await asyncio.to_thread(urllib.request.urlopen, delete, timeout=60)).close()
