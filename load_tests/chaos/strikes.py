"""What befalls a cluster: kinds of faults, each struck and, where it does not pass by itself, healed again.

A strike returns when the fault is over, not when the cluster has recovered, with its victim and what proves that it
happened. It raises OSError or LookupError if it could not be done.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from load_tests.chaos import partition
from load_tests.chaos.capacity import Capacity
from load_tests.chaos.clients import Clients, Expected
from load_tests.chaos.cluster import CONTROLLER, Cluster
from load_tests.chaos.collector import Collector
from load_tests.chaos.plan import Fault

SLOW_S, STOPPED_SHARE = 0.2, 0.9
"""A slowed process runs for a tenth of every so many seconds."""
RESTART_S = 60.0
POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Scene:
    cluster: Cluster
    capacity: Capacity
    clients: Clients
    collector: Collector
    fillers: Sequence[Expected]
    """Requests that, asked at once, leave no replica a free block."""


@dataclass(frozen=True, slots=True)
class Victim:
    name: str
    pid: int


Strike = Callable[[Scene, Fault], Awaitable[dict[str, Any]]]


async def kill_replica(scene: Scene, fault: Fault) -> dict[str, Any]:
    return _kill(scene, fault.pick(_replicas(scene)))


async def freeze_replica(scene: Scene, fault: Fault) -> dict[str, Any]:
    return await _freeze(scene, fault.pick(_replicas(scene)), fault.length_s)


async def slow_replica(scene: Scene, fault: Fault) -> dict[str, Any]:
    """Let it run for a tenth of the time."""
    victim = fault.pick(_replicas(scene))
    scene.cluster.check(victim.pid)
    end = time.monotonic() + fault.length_s
    while time.monotonic() < end:
        with _stopped(victim):
            await asyncio.sleep(SLOW_S * STOPPED_SHARE)
        await asyncio.sleep(SLOW_S * (1 - STOPPED_SHARE))
    return {"victim": victim.name, "length_s": fault.length_s}


async def kill_router(scene: Scene, fault: Fault) -> dict[str, Any]:
    return _kill(scene, fault.pick(_routers(scene)))


async def freeze_router(scene: Scene, fault: Fault) -> dict[str, Any]:
    return await _freeze(scene, fault.pick(_routers(scene)), fault.length_s)


async def kill_controller(scene: Scene, _: Fault) -> dict[str, Any]:
    """Return when Ray has started another one."""
    victim = _controller(scene)
    figures = _kill(scene, victim)
    give_up = time.monotonic() + RESTART_S
    while await asyncio.to_thread(scene.cluster.find, CONTROLLER) in (None, victim.pid):
        if time.monotonic() > give_up:
            raise LookupError(f"no other controller of Serve within {RESTART_S:g} s")
        await asyncio.sleep(POLL_S)
    return figures


async def freeze_controller(scene: Scene, fault: Fault) -> dict[str, Any]:
    return await _freeze(scene, _controller(scene), fault.length_s)


async def kill_replica_unseen(scene: Scene, fault: Fault) -> dict[str, Any]:
    """Kill a replica while Serve's controller is frozen: nobody replaces it, nobody says that it is gone."""
    victim = fault.pick(_replicas(scene))
    with _stopped(_controller(scene)):
        figures = _kill(scene, victim)
        await asyncio.sleep(fault.length_s)
    return figures | {"length_s": fault.length_s}


async def cut_link(scene: Scene, fault: Fault) -> dict[str, Any]:
    """Drop all packets between one router and one replica."""
    pairs = [
        (Victim(router.id, router.pid), replica)
        for router in (status.router for status in _statuses(scene))
        for replica in scene.capacity.view.replicas
    ]
    if not pairs:
        raise LookupError("there is no router, or no replica")
    router, replica = fault.pick(pairs)
    for pid in (router.pid, replica.pid):
        scene.cluster.check(pid)
    port = int(replica.address.rpartition(":")[2])
    with partition.cut(router.pid, replica.pid, port) as connections:
        await asyncio.sleep(fault.length_s)
    name = f"{router.name} from {replica.id}"
    return {"victim": name, "length_s": fault.length_s, "connections": connections}


async def fill_memory(scene: Scene, _: Fault) -> dict[str, Any]:
    """Ask for more at once than all blocks hold; return when that is answered."""
    least: dict[str, int] = {}
    preempted = [_preemptions(scene)]
    filling = asyncio.create_task(scene.clients.ask_all(scene.fillers))
    try:
        while not filling.done():
            for each in scene.capacity.view.replicas:
                least[each.id] = min(least.get(each.id, each.num_blocks), each.num_free_blocks)
            preempted.append(_preemptions(scene))
            await asyncio.sleep(POLL_S)
    finally:
        filling.cancel()
        with suppress(asyncio.CancelledError):
            await filling
    blocks = sorted(least.values())
    return {"victim": "all replicas", "least_free_blocks": blocks, "preemptions": max(preempted) - preempted[0]}


async def lose_collector(scene: Scene, fault: Fault) -> dict[str, Any]:
    """Nobody listens where spans go."""
    async with scene.collector.dead():
        await asyncio.sleep(fault.length_s)
    return {"victim": "collector", "length_s": fault.length_s, "exports_so_far": scene.collector.num_exports}


async def mute_collector(scene: Scene, fault: Fault) -> dict[str, Any]:
    """Whoever takes spans never answers."""
    before = scene.collector.num_unanswered
    with scene.collector.mute():
        await asyncio.sleep(fault.length_s)
    unanswered = scene.collector.num_unanswered - before
    return {"victim": "collector", "length_s": fault.length_s, "exports_unanswered": unanswered}


async def lose_node(scene: Scene, fault: Fault) -> dict[str, Any]:
    """Kill a node, and with it all that runs there."""
    nodes = await asyncio.to_thread(scene.cluster.nodes)
    if not nodes:
        raise LookupError("there is no node but the head")
    node = fault.pick(nodes)
    lost = await asyncio.to_thread(scene.cluster.lose, node)
    scene.capacity.gone |= lost
    return {"victim": f"node {node[-5:]}", "processes": len(lost)}


NODE_LOST = "node lost"
STRIKES: Mapping[str, Strike] = {
    "replica killed": kill_replica,
    "replica frozen": freeze_replica,
    "replica slowed tenfold": slow_replica,
    "router killed": kill_router,
    "router frozen": freeze_router,
    "controller killed": kill_controller,
    "controller frozen": freeze_controller,
    "replica killed, controller frozen": kill_replica_unseen,
    "router cut off a replica": cut_link,
    "memory filled": fill_memory,
    "collector dead": lose_collector,
    "collector mute": mute_collector,
    NODE_LOST: lose_node,
}


def _preemptions(scene: Scene) -> int:
    return sum(each.num_preemptions for each in scene.capacity.view.replicas)


def _kill(scene: Scene, victim: Victim) -> dict[str, Any]:
    scene.cluster.check(victim.pid)
    _signal(victim, signal.SIGKILL)
    scene.capacity.gone.add(victim.pid)
    return {"victim": victim.name}


async def _freeze(scene: Scene, victim: Victim, length_s: float) -> dict[str, Any]:
    scene.cluster.check(victim.pid)
    with _stopped(victim):
        await asyncio.sleep(length_s)
    return {"victim": victim.name, "length_s": length_s}


@contextmanager
def _stopped(victim: Victim) -> Iterator[None]:
    """Stop a process of the cluster for the scope."""
    _signal(victim, signal.SIGSTOP)
    try:
        yield
    finally:
        _signal(victim, signal.SIGCONT)


def _signal(victim: Victim, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(victim.pid, number)


def _statuses(scene: Scene) -> list[Any]:
    routers = scene.capacity.view.routers
    return [routers[name] for name in sorted(routers)]


def _routers(scene: Scene) -> list[Victim]:
    found = [Victim(status.router.id, status.router.pid) for status in _statuses(scene)]
    if not found:
        raise LookupError("no router answers")
    return found


def _replicas(scene: Scene) -> list[Victim]:
    found = [Victim(each.id, each.pid) for each in scene.capacity.view.replicas]
    if not found:
        raise LookupError("no replica is ready")
    return found


def _controller(scene: Scene) -> Victim:
    pid = scene.cluster.find(CONTROLLER)
    if pid is None:
        raise LookupError("there is no controller of Serve")
    return Victim("controller", pid)
