"""One family under chaos: learn the answers, load, strike, wait until it is over, and note what happened."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from load_tests.chaos.capacity import Capacity
from load_tests.chaos.clients import Clients, Expected
from load_tests.chaos.cluster import Cluster, serving
from load_tests.chaos.collector import Collector
from load_tests.chaos.families import Family
from load_tests.chaos.plan import Fault
from load_tests.chaos.report import answers, effects, faults_of
from load_tests.chaos.strikes import STRIKES, Scene
from load_tests.chaos.verdict import Struck
from load_tests.notes import Notes
from load_tests.rigs.rig_load import left_behind

IDLE_S = 60.0
"""How long routers and replicas may take to have nothing left; a router keeps what a broken Session had for 30 s."""
TICK_S = 0.1


@dataclass(slots=True)
class Course:
    """What has happened so far; of a run that is broken off, too."""

    clients: Clients | None = None
    cluster: Cluster | None = None
    struck: list[Struck] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Of every fault, those that could not be struck included."""
    not_reference: int | None = None
    idle_s: float | None = None
    lag_s: float = 0.0
    """How much later than it should this process has come to do something, at most."""

    def note(self, family: str, notes: Notes) -> None:
        if self.clients is None:
            return
        replies = self.clients.replies
        number = 0
        for row in self.rows:
            effect = {} if row["failure"] else effects(replies, self.struck, number)
            number += not row["failure"]
            notes.add(faults_of(family), **row, **effect)
        cluster = self.cluster
        notes.add(
            family,
            **answers(replies, self.struck),
            not_reference=self.not_reference,
            idle_s=self.idle_s,
            lag_s=round(self.lag_s, 3),
            left=None if cluster is None else cluster.left,
            processes=None if cluster is None else len(cluster.seen),
        )


async def run(
    family: Family, faults: Sequence[Fault], course: Course, *, duration_s: float, is_quick: bool, logs: Path | None
) -> None:
    """Strike `faults` while clients ask for `duration_s`; `course` says what came of it."""
    async with Collector() as collector:
        variables = {**family.variables, "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
        async with serving(family.options, variables, nodes=family.nodes, logs=logs) as course.cluster:
            cluster = course.cluster
            clients = course.clients = Clients(cluster.address, cluster.routers, random.Random(family.asks))
            rng = random.Random(family.replicas)
            asks = family.make_asks(family.quick_asks if is_quick else family.asks, rng)
            pool = await clients.learn(asks, at_once=family.clients * family.streams)
            fillers = await clients.learn(family.make_fillers(rng), at_once=family.fillers_at_once)
            course.not_reference = sum(map(_is_strange, (*pool, *fillers)))
            async with Capacity(cluster.address, routers=family.routers, replicas=family.replicas) as capacity:
                if not await capacity.restored():
                    raise RuntimeError(f"not {family.routers} routers with {family.replicas} replicas: {capacity.view}")
                scene = Scene(cluster, capacity, clients, collector, fillers)
                await _load(scene, family, pool, faults, course, duration_s)
                course.idle_s = await _idle_after(capacity)


async def _load(
    scene: Scene, family: Family, pool: Sequence[Expected], faults: Sequence[Fault], course: Course, duration_s: float
) -> None:
    """Ask and strike, and return when every request is over."""
    lagging = asyncio.create_task(_watch_lag(course))
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(scene.clients.run(pool, clients=family.clients, streams=family.streams))
            await asyncio.sleep(0)
            for number, fault in enumerate(faults):
                next_s = faults[number + 1].due_s if number + 1 < len(faults) else math.inf
                await asyncio.sleep(fault.due_s - scene.clients.now_s)
                if scene.clients.now_s < next_s:
                    await _strike(scene, fault, course)
            await asyncio.sleep(duration_s - scene.clients.now_s)
            scene.clients.stop()
    finally:
        lagging.cancel()


async def _strike(scene: Scene, fault: Fault, course: Course) -> None:
    """Strike, wait until capacity is back, and note it."""
    await asyncio.to_thread(scene.cluster.check_alive)
    struck_s = scene.clients.now_s
    row: dict[str, Any] = {"kind": fault.kind, "at_s": round(struck_s, 1), "recovery_s": None, "failure": ""}
    try:
        row |= await STRIKES[fault.kind](scene, fault)
    except (OSError, LookupError) as error:
        row["failure"] = str(error)
    else:
        recovery_s = scene.clients.now_s - struck_s if await scene.capacity.restored() else None
        row["recovery_s"] = None if recovery_s is None else round(recovery_s, 2)
        course.struck.append(Struck(kind=fault.kind, struck_s=struck_s, recovery_s=recovery_s))
    course.rows.append(row)
    said = row["failure"] or f"capacity back after {row['recovery_s']} s"
    print(f"chaos: {row['at_s']:6.1f} s  {fault.kind}, {row.get('victim', '')}: {said}", flush=True)


async def _idle_after(capacity: Capacity) -> float | None:
    """Return how long it takes until routers and replicas have nothing left; None: longer than `IDLE_S`."""
    began = time.monotonic()
    while time.monotonic() < began + IDLE_S:
        statuses = capacity.view.routers.values()
        is_fresh = capacity.view.asked_at >= began and len(statuses) == capacity.routers
        if is_fresh and not any(map(left_behind, statuses)):
            return round(time.monotonic() - began, 2)
        await asyncio.sleep(TICK_S)
    print("chaos: left over:", *map(left_behind, capacity.view.routers.values()), flush=True)
    return None


async def _watch_lag(course: Course) -> None:
    while True:
        began = time.monotonic()
        await asyncio.sleep(TICK_S)
        course.lag_s = max(course.lag_s, time.monotonic() - began - TICK_S)


def _is_strange(expected: Expected) -> bool:
    """Whether an answer is another one than it is known to be."""
    reference = expected.ask.reference
    return reference is not None and reference != expected.answer.token_ids
