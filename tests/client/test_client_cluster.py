"""The client and the command line against a whole cluster: Ray, a router, two replicas of the engine `fake`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from octavo.client import Client, NotFoundError

from cluster.cli_batch import run_batch
from tests.client.test_cli_client import octavo
from tests.client.waiting import until
from tests.cluster import ClusterProcess

pytestmark = pytest.mark.cluster


@pytest.fixture
async def client(fake_cluster: ClusterProcess) -> AsyncIterator[Client]:
    async with Client(fake_cluster.address) as client:
        yield client


async def test_a_hundred_answers_side_by_side_are_those_of_one_alone(client: Client) -> None:
    alone = await client.complete("The capital of France is", max_tokens=20)
    assert len(alone.token_ids) == 20
    answers = await asyncio.gather(*(client.complete("The capital of France is", max_tokens=20) for _ in range(100)))
    assert {answer.token_ids for answer in answers} == {alone.token_ids}
    assert len({answer.usage.replica for answer in answers if answer.usage}) == 2


async def test_leaving_early_frees_the_replicas(client: Client) -> None:
    async def leave(i: int) -> None:
        async for _ in client.generate(f"Never ending {i}", max_tokens=2000, ignore_eos=True):
            break

    await asyncio.gather(*(leave(i) for i in range(20)))

    async def num_running() -> int:
        status = await client.status()
        return status.router.num_running_requests + sum(replica.num_running for replica in status.replicas)

    async with asyncio.timeout(30):
        while await num_running():  # noqa: ASYNC110 - the cluster's state, seen from outside
            await asyncio.sleep(0.05)


async def test_what_the_cluster_does_not_serve(client: Client) -> None:
    with pytest.raises(NotFoundError, match="gpt-9"):
        await client.complete("p", model="gpt-9")


async def test_the_command_line_sees_the_whole_cluster(
    client: Client, fake_cluster: ClusterProcess, tmp_path: Path
) -> None:
    # Other tests have replicas of this cluster killed, so that they are not those of its start.
    pids = {replica.pid for replica in (await client.status()).replicas}
    assert len(pids) == 2
    tasks, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    tasks.write_text("".join(json.dumps({"prompt": f"p{i}", "max_tokens": 5}) + "\n" for i in range(30)))
    generated, status, failed = await asyncio.gather(
        octavo(fake_cluster.address, "generate", "Hi", "--max-tokens", "5", "--json"),
        octavo(fake_cluster.address, "status", "--json"),
        run_batch(Client(fake_cluster.address), tasks, answers, model="", timeout_s=None, options={}, concurrency=16),
    )
    assert generated.code == 0
    assert len(json.loads(generated.stdout)["token_ids"]) == 5
    replicas = json.loads(status.stdout)["replicas"]
    assert {replica["pid"] for replica in replicas} == pids
    assert {replica["engine"] for replica in replicas} == {"fake"}
    assert failed == 0
    await until(lambda: len(answers.read_text().splitlines()) == 30)
