"""From no replica at all: requests wait inside their deadlines for one to start; those that cannot are told at once.

A request that nobody has to wait for goes first, so that the cluster knows how long a replica takes to start. Then,
each time that there is no replica left: some requests with time enough, which must be answered within it, and one
whose deadline is over before any replica can be there, which must be refused at once and not by its deadline.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

from octavo.client import CallError

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.rigs.elastic_fake import ANSWER_TOKENS, SEQUENCES, fake_config
from load_tests.rigs.elastic_load import Crowd, outcome
from load_tests.rigs.elastic_watch import Watch

DOWN_S = 2.0
CONFIG = fake_config(
    f"min_replicas = 0\nmax_replicas = 2\ndownscale_delay_s = {DOWN_S}\nzero_delay_s = {DOWN_S}\nmax_step_down = 0"
)
NONE_S, DEADLINE_S, SHORT_S = 60.0, 30.0, 0.9
AT_ONCE_S = 0.25
FROM_ZERO = "from zero"


async def measure(settings: Settings, notes: Notes) -> None:
    async with serving(CONFIG) as cluster:
        await cluster.client.generate([1, 2, 3], max_tokens=4).complete()
        for _ in settings.rounds():
            notes.add(FROM_ZERO, **await _from_zero(cluster))


async def _from_zero(cluster: Cluster) -> dict[str, Any]:
    async with Watch(cluster.client) as watch:
        none_at = await watch.until(lambda sample: not sample.states and sample.target == 0, NONE_S)
        refused_s, error = await _hopeless(cluster)
        asked_at = time.monotonic()
        async with Crowd(cluster.client, tokens=ANSWER_TOKENS, deadline_s=DEADLINE_S) as crowd:
            crowd.begin(SEQUENCES)
        served_at = watch.timeline.first(lambda sample: sample.ready, asked_at)
    return {
        **outcome(crowd.streams),
        "was_none": none_at is not None,
        "answered_s": round(time.monotonic() - asked_at, 3),
        "serves_s": None if served_at is None else round(served_at - asked_at, 3),
        "refused_s": refused_s,
        "refusal": error,
        "steps": watch.timeline.figures(asked_at),
    }


async def _hopeless(cluster: Cluster) -> tuple[float | None, str]:
    """Ask with a deadline that no start can meet; return how soon that was refused, and how. None: it was not."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(DEADLINE_S):
            await cluster.client.generate([1, 2, 3], max_tokens=ANSWER_TOKENS, timeout=SHORT_S).complete()
    except CallError as error:
        return round(time.monotonic() - began, 3), f"{error.code.name}/{error.reason}"
    except TimeoutError:
        return None, "nothing came"
    return None, "answered"


def judge(notes: Notes) -> list[Bar]:
    rounds = len(notes.of(FROM_ZERO, "sent"))
    were_none = sum(notes.of(FROM_ZERO, "was_none"))
    refused = notes.of(FROM_ZERO, "refused_s")
    detail = (
        f"deadlines of {DEADLINE_S:g} s; all answered after {figure(notes.worst(FROM_ZERO, 'answered_s'), 's')}, a "
        f"replica ready after {figure(notes.worst(FROM_ZERO, 'serves_s'), 's')}"
    )
    return [
        at_least("from zero: rounds that began without a replica", were_none or None, max(rounds, 1)),
        at_most("from zero: answers late, lost or wrong", notes.total(FROM_ZERO, "wrong"), 0, detail),
        at_most(
            "from zero: a deadline before any start refused after, s",
            max(refused) if len(refused) == rounds and refused else None,
            AT_ONCE_S,
            f"deadline {SHORT_S:g} s: {', '.join(sorted(set(notes.of(FROM_ZERO, 'refusal')))) or 'not measured'}",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main("elastic_zero", measure, judge))
