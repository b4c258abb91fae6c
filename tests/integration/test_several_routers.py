"""Several routers in front of the same replicas: one port, each with an address of its own, and one that dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from urllib.request import urlopen

import pytest
from octavo.client import Client

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import running
from tests.integration.calls import await_status, connected, has_ready, is_idle, octavo_trace
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster


async def test_a_router_that_is_killed_under_load_costs_no_answer() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        metrics_port = probe.getsockname()[1]
    with running(
        "--model",
        "fake",
        "--engine",
        "fake",
        "--replicas",
        "2",
        OCTAVO_SERVE__NUM_ROUTERS="2",
        OCTAVO_ENGINE__FAKE_STEP_S="0.01",
        OCTAVO_TELEMETRY__METRICS_PORT=str(metrics_port),
    ) as cluster:
        routers = cluster.ready["routers"]
        assert len(set(routers)) == 2
        assert cluster.address not in routers
        pids = []
        for address in routers:
            async with connected(address) as channel:
                pids.append((await await_status(channel, has_ready(2))).router.pid)
        assert len(set(pids)) == 2
        await _assert_each_is_asked(routers)
        assert cluster.ready["metrics"] == f"http://127.0.0.1:{metrics_port}/metrics"
        told = await _told_routers(cluster.ready["metrics"])
        assert len(told) == 2
        prompts = [[n] * 20 for n in range(3, 35)]
        async with Client(routers) as client, Client(cluster.address) as shared:
            generations = [
                (each.generate(prompt, max_tokens=150, temperature=0, ignore_eos=True), prompt)
                for each in (client, shared)
                for prompt in prompts
            ]
            tasks = [asyncio.create_task(generation.complete()) for generation, _ in generations]
            await asyncio.sleep(0.7)
            os.kill(pids[0], signal.SIGKILL)
            for task, (_, prompt) in zip(tasks, generations, strict=True):
                completion = await task
                assert list(completion.token_ids) == fake_continuation(prompt, 150, VOCAB_SIZE)
        async with connected(routers[1]) as channel:
            assert is_idle(await await_status(channel, is_idle))
        assert await _told_routers(cluster.ready["metrics"]) & told


async def _told_routers(address: str) -> set[str]:
    """Return the routers that have metrics at the address that all of them share, whichever of them is asked."""
    answer = await asyncio.to_thread(urlopen, address)
    lines = answer.read().decode().splitlines()
    return {line.split('"')[1] for line in lines if line.startswith("octavo_sessions{") and 'process="router"' in line}


async def _assert_each_is_asked(routers: list[str]) -> None:
    """What one router has done `octavo trace` finds through the other one."""
    async with Client(routers[0]) as client:
        await client.complete([1, 2, 3], max_tokens=3, request_id="by-the-first")
    async with connected(routers[1]) as channel:
        await await_status(channel, lambda found: len(found.routers) == 2)
    code, out, err = await octavo_trace(routers[1], "by-the-first")
    assert (code, err) == (0, "")
    assert "request by-the-first: model fake" in out
    code, out, err = await octavo_trace(routers[1], "--slowest", "5")
    assert (code, err) == (0, "")
    assert "by-the-first" in out
    assert "requests that 2 routers remember" in out
