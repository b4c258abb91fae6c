"""vLLM's engine process dies under load: its replica's streams go on with the other one, token for token."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import grpc
import pytest

from tests.cluster import ClusterProcess
from tests.integration.calls import await_status, connected, generate, has_ready, is_idle, request
from tests.oracle.answers import committed_answers
from tests.vllm_engine.conftest import START_TIMEOUT_S
from workers.vllm_engine.guard import descendants

pytestmark = [pytest.mark.cluster, pytest.mark.exact]

NUM_TOKENS = 100


def engine_of(pid: int) -> int:
    """Return vLLM's engine process below a replica."""
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            if b"EngineCore" in (Path("/proc") / str(child) / "cmdline").read_bytes():
                return child
    raise AssertionError(f"no EngineCore below {pid}")


async def test_streams_go_on_when_vllms_engine_is_killed(vllm_cluster: ClusterProcess) -> None:
    prompts = [entry.prompt for entry in committed_answers() if len(entry.prompt) < 200][:16]
    async with connected(vllm_cluster.address) as channel:
        before = await await_status(channel, has_ready(2), START_TIMEOUT_S)

        async def all_of_them(begun: asyncio.Semaphore) -> list[list[int]]:
            asked = [request(prompt, NUM_TOKENS) for prompt in prompts]
            for each in asked:
                each.sampling.temperature = 0.0
            answers = await asyncio.gather(
                *(generate(channel, each, timeout_s=START_TIMEOUT_S, on_tokens=begun.release) for each in asked)
            )
            assert {answer.code for answer in answers} == {grpc.StatusCode.OK}, answers
            replicas.append({answer.replica for answer in answers})
            return [answer.tokens for answer in answers]

        replicas: list[set[str]] = []
        undisturbed = await all_of_them(asyncio.Semaphore(0))
        begun = asyncio.Semaphore(0)
        again = asyncio.create_task(all_of_them(begun))
        for _ in prompts:
            await begun.acquire()
        victim = before.replicas[0]
        os.kill(engine_of(victim.pid), signal.SIGKILL)
        assert await again == undisturbed
        assert replicas[0] == {replica.id for replica in before.replicas}, "both had some of them"
        assert replicas[1] == {before.replicas[1].id}, "all have ended on the other one"
        after = await await_status(channel, lambda found: has_ready(2)(found) and is_idle(found), START_TIMEOUT_S)
    assert victim.id not in {replica.id for replica in after.replicas}, "Serve has replaced it"
