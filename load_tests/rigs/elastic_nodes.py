"""From one node to three and back, driven by what clients ask alone: Ray's fake provider adds a node for each replica
that does not fit, and ends nodes that have nothing.

A replica reserves a node's one CPU. With both versions of Ray's autoscaler, one after the other: KubeRay can use
either. A minute and a half each.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.rigs.elastic_fake import ANSWER_TOKENS, SEQUENCES, fake_config
from load_tests.rigs.elastic_load import Crowd, constant, outcome
from load_tests.rigs.elastic_timeline import Sample, Timeline
from load_tests.rigs.elastic_watch import Watch
from load_tests.rigs.fake_nodes import AUTOSCALERS, FakeNodes

NODES, DOWN_S, IDLE_S = 3, 5.0, 6.0
CONFIG = fake_config(
    f"min_replicas = 1\nmax_replicas = {NODES}\ndownscale_delay_s = {DOWN_S}\nmax_step_down = 0",
    other="[resources]\nnum_cpus = 1.0",
)
UP_S, BACK_S, HOLD_S = 120.0, 120.0, 5.0


async def measure(settings: Settings, notes: Notes) -> None:
    for autoscaler in AUTOSCALERS[: 1 if settings.is_quick else None]:
        with FakeNodes(max_nodes=NODES, idle_s=IDLE_S, autoscaler=autoscaler) as nodes:
            async with serving(CONFIG, ray_address=nodes.address) as cluster:
                notes.add(autoscaler, **await _there_and_back(cluster, nodes))


async def _there_and_back(cluster: Cluster, nodes: FakeNodes) -> dict[str, Any]:
    async with Watch(cluster.client, nodes) as watch:
        asked_at = time.monotonic()
        async with Crowd(cluster.client, tokens=ANSWER_TOKENS) as crowd:
            load = asyncio.create_task(crowd.follow(constant((NODES + 1) * SEQUENCES), UP_S))
            await watch.until(lambda sample: len(sample.ready) == NODES, UP_S)
            await asyncio.sleep(HOLD_S)
            load.cancel()
        ended_at = time.monotonic()
        await watch.until(lambda sample: sample.num_nodes == 1 and len(sample.states) == 1, BACK_S)
        async with Crowd(cluster.client, tokens=ANSWER_TOKENS) as after:
            after.begin(1)
    return {
        **outcome([*crowd.streams, *after.streams]),
        **nodes_figures(watch.timeline, asked_at, ended_at),
        "steps": watch.timeline.figures(asked_at),
    }


def nodes_figures(timeline: Timeline, asked_at: float, ended_at: float) -> dict[str, Any]:
    """Return the most and the last number of nodes, and how long it took until they served and were gone."""

    def is_up(sample: Sample) -> bool:
        return sample.num_nodes >= NODES and len(sample.ready) >= NODES

    up_at = timeline.first(is_up, asked_at)
    back_at = timeline.first(lambda sample: sample.num_nodes == 1, ended_at)
    return {
        "first_nodes": timeline.samples[0].num_nodes,
        "most_nodes": max(sample.num_nodes for sample in timeline.samples),
        "last_nodes": timeline.samples[-1].num_nodes,
        "up_s": None if up_at is None else round(up_at - asked_at, 2),
        "back_s": None if back_at is None else round(back_at - ended_at, 2),
    }


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for autoscaler in AUTOSCALERS:
        name = f"one node to {NODES} and back, autoscaler {autoscaler}"
        runs = len(notes.of(autoscaler, "up_s"))
        detail = (
            f"{NODES} serve after {figure(notes.worst(autoscaler, 'up_s'), 's')}, one is left "
            f"{figure(notes.worst(autoscaler, 'back_s'), 's')} after the load"
        )
        fewest = min(notes.of(autoscaler, "most_nodes"), default=None) if runs else None
        bars += [
            at_least(f"{name}: nodes at the most", fewest, NODES, detail),
            at_most(f"{name}: nodes before", notes.worst(autoscaler, "first_nodes"), 1),
            at_most(f"{name}: nodes after", notes.worst(autoscaler, "last_nodes"), 1),
            at_most(
                f"{name}: answers lost, repeated or wrong",
                notes.total(autoscaler, "wrong"),
                0,
                f"{figure(notes.total(autoscaler, 'sent'))} answers",
            ),
        ]
    return bars


if __name__ == "__main__":
    sys.exit(main("elastic_nodes", measure, judge))
