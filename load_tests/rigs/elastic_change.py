"""What clients notice of a drain and of a rolling update, with answers that run longer than a replica is given to end
them: nothing but where they are answered.

Three replicas have the load of two. `octavo drain` has one of them replaced; then `octavo apply` brings a configuration
in which all are. Answers take 12 s, a drain is given 2: each that is under way at its end goes on elsewhere. Judged is
that all are right, that there were such answers, and that the replicas are others than before. A minute and a half.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.rigs.elastic_fake import SEQUENCES, STEP_S, fake_config
from load_tests.rigs.elastic_load import Crowd, constant, outcome
from load_tests.rigs.elastic_timeline import Sample
from load_tests.rigs.elastic_watch import Watch

REPLICAS, GRACE_S, ANSWER_S = 3, 2.0, 12.0
ANSWER_TOKENS = round(ANSWER_S / STEP_S)
CHANGED = "max_token_age_s = 0.02"
CHANGE_S, WARM_S = 180.0, 4.0
DRAIN, APPLY = "octavo drain", "octavo apply"


def config(engine: str = "") -> str:
    return fake_config(
        "max_replicas = 0",
        engine=engine,
        other=f"[replicas]\nnum_replicas = {REPLICAS}\n[router]\ndrain_grace_s = {GRACE_S}",
    )


Change = Callable[[Cluster, frozenset[str]], Awaitable[int]]
"""Makes a change, given the replicas that there are; returns how many of them are to be replaced."""


async def drain(cluster: Cluster, replicas: frozenset[str]) -> int:
    await cluster.octavo("drain", min(replicas), "--ray-address", cluster.ray_address)
    return 1


async def apply(cluster: Cluster, replicas: frozenset[str]) -> int:
    await cluster.apply(config(CHANGED))
    return len(replicas)


CHANGES: dict[str, Change] = {DRAIN: drain, APPLY: apply}


async def measure(settings: Settings, notes: Notes) -> None:
    for _ in settings.rounds():
        async with serving(config()) as cluster:
            for what, change in CHANGES.items():
                notes.add(what, **await _change(cluster, change))


async def _change(cluster: Cluster, change: Change) -> dict[str, Any]:
    """Make a change while answers run, and wait until it is through."""
    async with Watch(cluster.client) as watch, Crowd(cluster.client, tokens=ANSWER_TOKENS) as crowd:
        load = asyncio.create_task(crowd.follow(constant((REPLICAS - 1) * SEQUENCES), 2 * CHANGE_S))
        await asyncio.sleep(WARM_S)
        before, began = watch.now.ready, time.monotonic()
        to_replace = await change(cluster, before)

        def is_through(sample: Sample) -> bool:
            return (
                len(before - sample.states.keys()) >= to_replace and len(sample.ready) == len(sample.states) == REPLICAS
            )

        through_at = await watch.until(is_through, CHANGE_S)
        load.cancel()
    return {
        **outcome(crowd.streams),
        "to_replace": to_replace,
        "replaced": len(before - watch.now.states.keys()),
        "fewest_ready": min(len(sample.ready) for sample in watch.timeline.between(began).samples),
        "through_s": None if through_at is None else round(through_at - began, 2),
        "steps": watch.timeline.figures(began),
    }


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for what in CHANGES:
        gap, ready = notes.worst(what, "gap_max_s"), min(notes.of(what, "fewest_ready"), default=None)
        detail = (
            f"{figure(notes.total(what, 'sent'))} answers of {ANSWER_S:g} s, drains of {GRACE_S:g} s; through after "
            f"{figure(notes.worst(what, 'through_s'), 's')}, longest gap {figure(gap, 's')}, {figure(ready)} ready"
        )
        is_through = len(notes.of(what, "through_s")) == len(notes.of(what, "sent"))
        bars += [
            at_most(f"{what}: errors at clients, and other answers", notes.total(what, "wrong"), 0, detail),
            at_least(f"{what}: answers that went on elsewhere", min(notes.of(what, "handed_over"), default=None), 1),
            at_least(
                f"{what}: replicas replaced",
                notes.total(what, "replaced") if is_through else None,
                notes.total(what, "to_replace") or 1,
            ),
        ]
    return bars


if __name__ == "__main__":
    sys.exit(main("elastic_change", measure, judge))
