"""A load step from nothing to five times what one replica can do: how soon more replicas are asked for, how soon they
serve, and how soon there are no more than before when nobody asks any longer.

Each step is made with twice a replica's load, too, when one more replica starts. The own start time of a replica is
that of its process, from its beginning until a router has it ready: four that start at once share the cores with each
other, and with clients, router and the replica that is there.

`max_step_down` is 0, so that one decision may take all away. A round takes about a minute.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.rigs.elastic_fake import ANSWER_TOKENS, SEQUENCES, fake_config
from load_tests.rigs.elastic_load import Crowd, constant, outcome
from load_tests.rigs.elastic_timeline import Sample, Timeline
from load_tests.rigs.elastic_watch import Watch

TIMES, MAX_REPLICAS, DOWN_S = 5, 5, 5.0
CONFIG = fake_config(
    f"min_replicas = 1\nmax_replicas = {MAX_REPLICAS}\ndownscale_delay_s = {DOWN_S}\nmax_step_down = 0"
)
START_S, BACK_S, HOLD_S = 60.0, 60.0, 3.0
SINGLE, STEP = "load of 2 replicas", f"load of {TIMES} replicas"
MAX_RAISE_S, MAX_EXTRA_S = 1.0, 2.0
MAX_BACK_EXTRA_S = 1.0
"""Beyond the delay that is configured: the period of reports, and that of Serve's controller, some times over."""


async def measure(settings: Settings, notes: Notes) -> None:
    async with serving(CONFIG) as cluster:
        for _ in settings.rounds():
            notes.add(SINGLE, **await _step(cluster, 2))
            notes.add(STEP, **await _step(cluster, 2 if settings.is_quick else TIMES))


async def _step(cluster: Cluster, times: int) -> dict[str, Any]:
    """Put the load of so many replicas on one until all are there, take it away, and wait until one is left."""
    async with Watch(cluster.client) as watch:
        asked_at = time.monotonic()
        async with Crowd(cluster.client, tokens=ANSWER_TOKENS) as crowd:
            load = asyncio.create_task(crowd.follow(constant(times * SEQUENCES), START_S))
            await watch.until(lambda sample: len(sample.ready) >= times, START_S)
            await asyncio.sleep(HOLD_S)
            load.cancel()
        await watch.until(_is_back, DOWN_S + BACK_S)
    return {
        **outcome(crowd.streams),
        **step_figures(watch.timeline, watch.began, asked_at),
        "steps": watch.timeline.figures(asked_at),
    }


def _is_back(sample: Sample) -> bool:
    return sample.target == 1 and len(sample.states) == 1


def step_figures(timeline: Timeline, began: dict[str, float], asked_at: float) -> dict[str, Any]:
    """Return what a step notes. `began`: when replicas' processes began; `asked_at`: when the load did."""
    before = timeline.samples[0]
    backlog_at = timeline.first(lambda sample: sample.num_queued, asked_at)
    raised_at = timeline.first(lambda sample: (sample.target or 0) > (before.target or 0), asked_at)
    idle_at = timeline.last(lambda sample: sample.num_queued or sample.num_running)
    serving_at = {
        replica: at for replica, at in timeline.served_since().items() if replica not in before.ready and at >= asked_at
    }
    back_at = gone_at = None
    if idle_at is not None:
        back_at = timeline.first(lambda sample: sample.target == before.target is not None, idle_at)
        gone_at = timeline.first(_is_back, idle_at)
    own = [at - max(began[replica], asked_at) for replica, at in serving_at.items() if replica in began]
    waits = [at - (backlog_at or asked_at) for at in serving_at.values()]
    return {
        "new": len(serving_at),
        "raised_s": _between(backlog_at, raised_at),
        "first_serves_s": round(min(waits), 3) if waits else None,
        "last_serves_s": round(max(waits), 3) if waits else None,
        "own_start_s": round(max(own), 3) if own else None,
        "extra_max_s": round(max(wait - start for wait, start in zip(waits, own, strict=True)), 3)
        if waits and len(waits) == len(own)
        else None,
        "back_s": _between(idle_at, back_at),
        "gone_s": _between(idle_at, gone_at),
    }


def _between(since: float | None, until: float | None) -> float | None:
    return None if since is None or until is None else round(until - since, 3)


def judge(notes: Notes) -> list[Bar]:
    one, step = notes.worst(SINGLE, "last_serves_s"), notes.worst(STEP, "last_serves_s")
    own = (
        f"own {figure(notes.worst(SINGLE, 'own_start_s'), 's')}",
        f"own {figure(notes.worst(STEP, 'own_start_s'), 's')}",
    )
    return [
        at_most(
            "load step: target raised after the backlog appeared, s",
            _worst(notes, "raised_s"),
            MAX_RAISE_S,
            f"{len(notes.of(STEP, 'new'))} steps of {TIMES} times a replica's load, as many of twice",
        ),
        at_most(
            "load step: new replicas serve after the backlog appeared, s beyond their own start time",
            _worst(notes, "extra_max_s"),
            MAX_EXTRA_S,
            f"one after {figure(one, 's')}, {own[0]}; the last of {TIMES - 1} after {figure(step, 's')}, {own[1]}",
        ),
        at_most(
            "load step: target back at the minimum, s after the last answer",
            _worst(notes, "back_s"),
            DOWN_S + MAX_BACK_EXTRA_S,
            f"configured {DOWN_S:g} s; replicas gone after {figure(notes.worst(STEP, 'gone_s'), 's')}",
        ),
        at_most("load step: answers lost, repeated or wrong", _wrong(notes), 0, _told(notes)),
    ]


def _worst(notes: Notes, name: str) -> float | None:
    """Return the largest figure of all steps; None if one has none."""
    figures = [notes.of(what, name) for what in (SINGLE, STEP)]
    is_whole = all(
        len(found) == len(notes.of(what, "new")) for what, found in zip((SINGLE, STEP), figures, strict=True)
    )
    return max((each for found in figures for each in found), default=None) if is_whole else None


def _wrong(notes: Notes) -> float | None:
    counts = [notes.total(what, "wrong") for what in (SINGLE, STEP)]
    return None if None in counts else sum(count or 0 for count in counts)


def _told(notes: Notes) -> str:
    sent = sum(notes.total(what, "sent") or 0 for what in (SINGLE, STEP))
    return f"{sent:g} answers"


if __name__ == "__main__":
    sys.exit(main("elastic_step", measure, judge))
