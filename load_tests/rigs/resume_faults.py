"""What befalls one of two replicas in the middle of its answers: a kill, a freeze that ends while others go on with
them, and a drain that is too short for them. Each says what it did, for the notes.

Replicas are ended or stopped by their pid, as the router tells it, and drained by Serve.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.client import Client
from octavo.v1.status_service_pb2 import GetStatusResponse, ReplicaStatus

from load_tests.rigs.attached_process import AttachedProcess
from load_tests.rigs.resume_crowd import Crowd
from load_tests.rigs.resume_stream import Stream

REPLICAS = 2
READY_S = 120.0
"""For a replacement to start and to load its model, beside whatever else runs."""
GONE_S = 60.0
GO_ON_S = 60.0
SETTLE_S, STALL_S = 0.5, 1.5
"""After a freeze: until what was under way has come; then how long a stream says nothing if it is a frozen one's. Both
are over before the router gives the replica up."""
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Scene:
    client: Client
    crowd: Crowd
    scaler: AttachedProcess | None = None


Fault = Callable[[Scene], Awaitable[dict[str, Any]]]


async def none(_: Scene) -> dict[str, Any]:
    """Let everything be."""
    return {}


async def kill(scene: Scene) -> dict[str, Any]:
    victim = await _busiest(scene.client)
    _mark(scene.crowd)
    os.kill(victim.pid, signal.SIGKILL)
    return {"victim_running": victim.num_running}


async def freeze(scene: Scene) -> dict[str, Any]:
    """Stop the process, and let it go on when others have gone on with half of its answers."""
    victim = await _busiest(scene.client)
    marked = _mark(scene.crowd)
    os.kill(victim.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(SETTLE_S)
        counts = {stream: len(stream.token_ids) for stream in marked}
        await asyncio.sleep(STALL_S)
        stalled = [stream for stream in marked if stream.is_open and len(stream.token_ids) == counts[stream]]

        def have_gone_on() -> bool:
            resumed = sum(len(stream.token_ids) > counts[stream] or stream.is_ended for stream in stalled)
            return 2 * resumed >= len(stalled)

        await scene.crowd.until(have_gone_on, GO_ON_S)
        running = sum(stream.is_open for stream in stalled)
    finally:
        os.kill(victim.pid, signal.SIGCONT)
    return {"victim_running": victim.num_running, "stalled": len(stalled), "running_at_thaw": running}


async def drain(scene: Scene) -> dict[str, Any]:
    """Have Serve stop one of the replicas gracefully, and start another when it is gone."""
    assert scene.scaler is not None
    await asyncio.to_thread(scene.scaler.ask, REPLICAS - 1)
    async with asyncio.timeout(GONE_S):
        while not _has_leaver((await scene.client.status()).replicas):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(POLL_S)
        began, running = time.monotonic(), scene.crowd.speaking()
        while len((await scene.client.status()).replicas) >= REPLICAS:  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(POLL_S)
    drain_s = time.monotonic() - began
    still = [stream for stream in running if stream.is_open]
    for stream in still:
        stream.set_mark()
    await asyncio.to_thread(scene.scaler.ask, REPLICAS)
    return {"drain_s": round(drain_s, 2), "running_at_end": len(still)}


async def await_ready(client: Client) -> None:
    """Return when the router has both replicas, and they nothing to do. Raises TimeoutError."""
    async with asyncio.timeout(READY_S):
        while not _is_ready(await client.status()):  # noqa: ASYNC110  nobody tells
            await asyncio.sleep(POLL_S)


def _is_ready(status: GetStatusResponse) -> bool:
    replicas = status.replicas
    return len(replicas) == REPLICAS and all(
        each.state == "ready" and each.num_running == each.num_waiting == 0 for each in replicas
    )


def _has_leaver(replicas: Sequence[ReplicaStatus]) -> bool:
    return len(replicas) < REPLICAS or any(each.state == "draining" for each in replicas)


async def _busiest(client: Client) -> ReplicaStatus:
    replicas = (await client.status()).replicas
    if [each.state for each in replicas] != ["ready"] * REPLICAS:
        raise RuntimeError(f"not {REPLICAS} ready replicas: {[(each.id, each.state) for each in replicas]}")
    return max(replicas, key=lambda each: each.num_running)


def _mark(crowd: Crowd) -> list[Stream]:
    """Remember how far every stream is; return those that have tokens, which are the marked ones."""
    speaking = crowd.speaking()
    for stream in speaking:
        stream.set_mark()
    return speaking
