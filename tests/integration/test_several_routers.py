"""Several routers in front of the same replicas: one port, each with an address of its own, and one that dies."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest
from octavo.client import Client

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import running
from tests.integration.calls import await_status, connected, has_ready, is_idle
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster


async def test_a_router_that_is_killed_under_load_costs_no_answer() -> None:
    with running(
        "--model",
        "fake",
        "--engine",
        "fake",
        "--replicas",
        "2",
        OCTAVO_SERVE__NUM_ROUTERS="2",
        OCTAVO_ENGINE__FAKE_STEP_S="0.01",
    ) as cluster:
        routers = cluster.ready["routers"]
        assert len(set(routers)) == 2
        assert cluster.address not in routers
        pids = []
        for address in routers:
            async with connected(address) as channel:
                pids.append((await await_status(channel, has_ready(2))).router.pid)
        assert len(set(pids)) == 2
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
