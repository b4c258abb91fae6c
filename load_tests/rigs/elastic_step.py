"""A load step from nothing to five times what one replica can do: how soon more replicas are asked for, how soon they
serve, and how soon there are no more than before when nobody asks any longer.

The own start time of a replica is that of the first one beyond the minimum when two replicas' load comes to an idle
cluster: from its being asked for until it serves. With five times the load four start at once, on the same cores that
clients, router and replicas use; of these each is also held to how long its own process took.

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
    raised = max((notes.worst(what, "raised_s") for what in (SINGLE, STEP)), key=lambda s: s or 0.0)
    is_raised = all(len(notes.of(what, "raised_s")) == len(notes.of(what, "new")) for what in (SINGLE, STEP))
    own, first = notes.median(SINGLE, "first_serves_s"), notes.worst(STEP, "first_serves_s")
    extra = None if own is None or first is None else first - own
    last = f"the last of {TIMES - 1} after {figure(notes.worst(STEP, 'last_serves_s'), 's')}"
    back = f"configured {DOWN_S:g} s; replicas gone after {figure(notes.worst(STEP, 'gone_s'), 's')}"
    rounds = f"{len(notes.of(STEP, 'new'))} steps of {TIMES} times a replica's load"
    return [
        at_most(
            "load step: target raised after the backlog appeared, s", raised if is_raised else None, MAX_RAISE_S, rounds
        ),
        at_most(
            "load step: first new replica serves, s beyond the start time of one alone",
            extra,
            MAX_EXTRA_S,
            f"{figure(first, 's')} after the backlog, alone {figure(own, 's')}; {last}",
        ),
        at_most(
            "load step: any new replica serves, s beyond its own process's start time",
            notes.worst(STEP, "extra_max_s"),
            MAX_EXTRA_S,
            f"own start at most {figure(notes.worst(STEP, 'own_start_s'), 's')}",
        ),
        at_most(
            "load step: target back at the minimum, s after the last answer",
            notes.worst(STEP, "back_s"),
            DOWN_S + MAX_BACK_EXTRA_S,
            back,
        ),
        at_most("load step: answers lost, repeated or wrong", _wrong(notes), 0, _told(notes)),
    ]


def _wrong(notes: Notes) -> float | None:
    counts = [notes.total(what, "wrong") for what in (SINGLE, STEP)]
    return None if None in counts else sum(count or 0 for count in counts)


def _told(notes: Notes) -> str:
    sent = sum(notes.total(what, "sent") or 0 for what in (SINGLE, STEP))
    return f"{sent:g} answers"


if __name__ == "__main__":
    sys.exit(main("elastic_step", measure, judge))
