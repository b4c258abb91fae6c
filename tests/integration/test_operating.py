"""A cluster that runs is changed by `octavo apply`, `octavo scale` and `octavo drain`, under streams that go on."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from octavo.client import Client

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import ClusterProcess
from tests.integration.calls import await_status, connected, has_ready
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster

CONFIG = """
model = "fake"
[serve]
port = 0
[replicas]
num_replicas = 2
health_check_period_s = 0.5
[router]
drain_grace_s = 1
tenant_header = "{header}"
[engine]
engine = "fake"
num_blocks = 4096
fake_step_s = {step_s}
"""
STEP_S = 0.005
NUM_STREAMS = 12
NUM_TOKENS = 800
"""Of a stream: 4 s, several times what a drain waits for it."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("operating") / "cluster.toml", step_s=STEP_S, header="octavo-tenant")


def write(path: Path, *, step_s: float, header: str) -> Path:
    path.write_text(CONFIG.format(step_s=step_s, header=header))
    return path


def changed(path: Path, old: str, new: str) -> Path:
    """Return a file with what `path` says, but for one thing."""
    other = path.with_name("other.toml")
    other.write_text(path.read_text().replace(old, new))
    return other


@pytest.fixture(scope="module")
def cluster(config: Path) -> Iterator[ClusterProcess]:
    """A cluster whose Ray wants a token, of which only its own processes know."""
    cluster = ClusterProcess.serve("--config", str(config), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="c0ffee" * 10)
    try:
        yield cluster.await_ready()
        assert cluster.stop() == 0
    finally:
        cluster.clean_up()


async def octavo(cluster: ClusterProcess, *arguments: str) -> tuple[int, str, str]:
    """Run a command against the cluster's Ray; return its exit code, stdout and stderr."""
    command = [sys.executable, "-m", "cluster.cli", *arguments, "--ray-address", cluster.ready["ray_address"]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OCTAVO_", "RAY_"))}
    process = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=100, check=False, env=environment
    )
    return process.returncode, process.stdout, process.stderr


@asynccontextmanager
async def streams(cluster: ClusterProcess) -> AsyncIterator[None]:
    """Have answers run for the scope, and one more after the other as long as it lasts; every one must be whole."""
    is_over = asyncio.Event()

    async def keep_asking(client: Client, number: int) -> None:
        prompt = [number + 3] * 20
        while True:
            answer = await client.complete(prompt, max_tokens=NUM_TOKENS, ignore_eos=True)
            assert list(answer.choices[0].token_ids) == fake_continuation(prompt, NUM_TOKENS, VOCAB_SIZE)
            if is_over.is_set():
                return

    async with Client(cluster.address) as client, asyncio.TaskGroup() as group:
        for number in range(NUM_STREAMS):
            group.create_task(keep_asking(client, number))
        await asyncio.sleep(0.5)
        yield
        is_over.set()


async def ids(cluster: ClusterProcess) -> tuple[str, set[str]]:
    """Return the router and the replicas, once there is one of the former and none of the latter on its way."""
    async with connected(cluster.address) as channel:
        found = await await_status(channel, lambda found: all(each.state == "ready" for each in found.replicas))
    return found.router.id, {replica.id for replica in found.replicas}


async def test_a_drained_replica_is_replaced_and_no_stream_notices(cluster: ClusterProcess) -> None:
    router, before = await ids(cluster)
    victim = min(before)
    async with streams(cluster):
        code, _, errors = await octavo(cluster, "drain", victim)
    assert code == 0, errors
    assert "one more replica is started before" in errors
    assert f"{victim} has gone" in errors
    assert "no room" not in errors
    after = await ids(cluster)
    assert after[0] == router
    assert len(after[1]) == 2
    assert len(after[1] - before) == 1
    assert victim not in after[1]


async def test_a_number_of_replicas_holds_until_load_decides_again(cluster: ClusterProcess) -> None:
    _, before = await ids(cluster)
    code, _, errors = await octavo(cluster, "scale", "fake", "3")
    assert code == 0, errors
    assert before < (more := (await ids(cluster))[1])
    assert len(more) == 3
    code, _, errors = await octavo(cluster, "scale", "fake", "auto")
    assert code == 0, errors
    async with connected(cluster.address) as channel:
        await await_status(channel, has_ready(2))


async def test_a_changed_configuration_rolls_out_under_streams_that_outlive_every_drain(
    cluster: ClusterProcess, config: Path
) -> None:
    router, before = await ids(cluster)
    write(config, step_s=0.004, header="x-tenant")
    async with streams(cluster):
        code, out, errors = await octavo(cluster, "apply", str(config))
    assert code == 0, errors
    applied = json.loads(out)
    assert applied["address"] == cluster.address
    assert applied["stopped"] == sorted({router, *before})
    assert {replica["id"] for replica in applied["replicas"] if replica["is_new"]} == (await ids(cluster))[1]


async def test_a_change_that_does_not_start_leaves_the_old_replicas_and_is_taken_back(
    cluster: ClusterProcess, config: Path
) -> None:
    before = await ids(cluster)
    broken = changed(config, 'engine = "fake"', 'engine = "paged"')
    code, out, errors = await octavo(cluster, "apply", str(broken))
    assert (code, out) == (3, "")
    assert "config.json" in errors
    code, out, errors = await octavo(cluster, "apply", str(config))
    assert code == 0, errors
    assert json.loads(out)["started"] == []
    assert await ids(cluster) == before


async def test_a_wrong_configuration_changes_nothing(cluster: ClusterProcess, config: Path) -> None:
    before = await ids(cluster)
    wrong = changed(config, "fake_step_s", "fake_steps_s")
    code, out, errors = await octavo(cluster, "apply", str(wrong))
    assert (code, out) == (2, "")
    assert "engine.fake_steps_s" in errors
    assert await ids(cluster) == before
