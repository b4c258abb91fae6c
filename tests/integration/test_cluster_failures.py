"""What clients see, and what is left, when replicas die and requests end in every way at once."""

from __future__ import annotations

import asyncio
import os
import random
import signal

import grpc
import grpc.aio
import pytest

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import ClusterProcess
from tests.integration.calls import (
    Answer,
    Session,
    await_status,
    connected,
    generate,
    has_ready,
    is_idle,
    request,
)
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster

NUM_REQUESTS = 500
ENDS = {
    grpc.StatusCode.OK,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
}
"""The last one: of requests whose deadline the router saw it could not meet."""


def assert_true_so_far(answer: Answer, prompt: list[int], max_tokens: int) -> None:
    """The answer is the engine's, whole if it ended well, and it ended once."""
    expected = fake_continuation(prompt, max_tokens, VOCAB_SIZE)
    assert answer.tokens == expected[: len(answer.tokens)]
    assert answer.num_terminals == 1
    assert answer.code in ENDS, answer
    assert answer.code is not grpc.StatusCode.OK or len(answer.tokens) == max_tokens
    assert answer.code is not grpc.StatusCode.RESOURCE_EXHAUSTED or (not answer.tokens and "deadline" in answer.details)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_streams_of_a_killed_or_frozen_replica_go_on(
    fake_cluster: ClusterProcess, number: signal.Signals
) -> None:
    prompts = [[n] * 20 for n in range(3, 35)]
    async with connected(fake_cluster.address) as channel, Session(channel) as session:
        before = await await_status(channel, has_ready(2))
        victim = before.replicas[0]
        begun = asyncio.Semaphore(0)
        calls = [
            asyncio.create_task(generate(channel, request(prompt, 300), on_tokens=begun.release)) for prompt in prompts
        ]
        await session.start({str(n): request(prompt, 300) for n, prompt in enumerate(prompts)})
        for _ in prompts:
            await begun.acquire()
        os.kill(victim.pid, number)
        try:
            answers = await asyncio.gather(*calls)
            await session.end()
        finally:
            if number == signal.SIGSTOP:
                os.kill(victim.pid, signal.SIGCONT)
        for answer, prompt in zip([*answers, *session.answers.values()], prompts * 2, strict=True):
            assert_true_so_far(answer, prompt, 300)
            assert answer.code is grpc.StatusCode.OK
        after = await await_status(channel, lambda found: has_ready(2)(found) and is_idle(found))
    assert (victim.id in {replica.id for replica in after.replicas}) == (number == signal.SIGSTOP)


async def test_requests_that_end_in_every_way_leave_nothing(fake_cluster: ClusterProcess) -> None:
    """500 requests over Generate and Session: finished, cancelled, late, disconnected, and a replica killed midway."""
    rng = random.Random(20)
    async with connected(fake_cluster.address) as channel:
        before = await await_status(channel, has_ready(2))
        ended = 0

        async def one(number: int) -> None:
            nonlocal ended
            await asyncio.sleep(rng.uniform(0, 4))
            prompt = [rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 60))]
            await _one(rng, fake_cluster.address, channel, prompt, str(number))
            ended += 1
            if ended == NUM_REQUESTS // 4:
                os.kill(before.replicas[1].pid, signal.SIGKILL)

        await asyncio.gather(*(one(number) for number in range(NUM_REQUESTS)))
        after = await await_status(
            channel, lambda found: is_idle(found) and has_ready(2)(found) and found.router.num_sessions == 0
        )
    assert after.router.num_ended_total - before.router.num_ended_total <= NUM_REQUESTS
    assert after.router.pid == before.router.pid


async def _one(rng: random.Random, address: str, channel: grpc.aio.Channel, prompt: list[int], name: str) -> None:
    """One request with a random length and a random fate."""
    max_tokens = rng.randrange(1, 60)
    asked = request(prompt, max_tokens)
    fate = rng.choice(("finish", "cancel", "late", "disconnect", "session", "session cancel", "session disconnect"))
    after_s = rng.uniform(0, 0.3)
    if fate == "finish":
        assert_true_so_far(await generate(channel, asked), prompt, max_tokens)
    elif fate == "cancel":
        assert_true_so_far(await generate(channel, asked, cancel_after_s=after_s), prompt, max_tokens)
    elif fate == "late":
        assert_true_so_far(await generate(channel, asked, timeout_s=0.01 + after_s), prompt, max_tokens)
    elif fate == "disconnect":
        async with grpc.aio.insecure_channel(address) as own:
            call = asyncio.create_task(generate(own, asked))
            await asyncio.sleep(after_s)
        assert_true_so_far(await call, prompt, max_tokens)
    else:
        async with Session(channel) as session:
            timeout_s = 0.01 + after_s if rng.random() < 0.3 else 60.0
            await session.start({name: asked}, timeout_s=timeout_s)
            if fate == "session disconnect":
                await asyncio.sleep(after_s)
                return
            if fate == "session cancel":
                await asyncio.sleep(after_s)
                await session.cancel(name)
            await session.end()
        assert_true_so_far(session.answers[name], prompt, max_tokens)
