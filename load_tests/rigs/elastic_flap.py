"""Loads that should not make the number of replicas go up and down: a square wave of 30 s, exactly what three replicas
can do, and the same with 20 % of noise.

A target that turns around, from up to down or from down to up, while the load is what it is, is a flap. How it first
gets there, and that it comes down when the load is over, is not judged here. Replicas may go `downscale_delay_s` after
they were last needed, which is longer than the low half of the wave: one who waits less has asked to follow it. Five
minutes.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import Cluster, serving
from load_tests.rigs.elastic_fake import ANSWER_TOKENS, SEQUENCES, fake_config
from load_tests.rigs.elastic_load import Crowd, Shape, constant, noisy, outcome, square
from load_tests.rigs.elastic_timeline import Timeline, turns
from load_tests.rigs.elastic_watch import Watch

REPLICAS, PERIOD_S, NOISE = 3, 30.0, 0.2
DOWN_S = 20.0
"""Longer than the low half of a period."""
CONFIG = fake_config(f"min_replicas = 1\nmax_replicas = 5\ndownscale_delay_s = {DOWN_S}\nmax_step_down = 0")
FULL = REPLICAS * SEQUENCES
LOADS: dict[str, tuple[Shape, float]] = {
    "square wave": (square(FULL, SEQUENCES // 2, period_s=PERIOD_S), 3 * PERIOD_S),
    "constant": (constant(FULL), 60.0),
    "noise": (noisy(FULL, NOISE, every_s=1.0, seed=7), 60.0),
}
"""What is asked, and for how long; each from one replica on."""
SETTLE_S = 20.0
"""For the way from one replica to what the load needs, and what of it was too much."""
BACK_S = 60.0


async def measure(settings: Settings, notes: Notes) -> None:
    async with serving(CONFIG) as cluster:
        for what, (shape, seconds) in LOADS.items():
            notes.add(what, **await _load(cluster, shape, settings.seconds(seconds, 8.0), settings.seconds(SETTLE_S)))


async def _load(cluster: Cluster, shape: Shape, seconds: float, settle_s: float) -> dict[str, Any]:
    async with Watch(cluster.client) as watch:
        began = time.monotonic()
        async with Crowd(cluster.client, tokens=ANSWER_TOKENS) as crowd:
            await crowd.follow(shape, seconds)
            ended = time.monotonic()
        await watch.until(lambda sample: sample.target == 1 and len(sample.states) == 1, DOWN_S + BACK_S)
    timeline = watch.timeline
    return {
        **outcome(crowd.streams),
        **flap_figures(timeline, began, ended, settle_s),
        "steps": timeline.figures(began),
    }


def flap_figures(timeline: Timeline, began: float, ended: float, settle_s: float) -> dict[str, Any]:
    """Return how often the target turned around and changed while the load was there, and once it had settled."""
    whole, settled = timeline.between(began, ended).targets(), timeline.between(began + settle_s, ended).targets()
    return {
        "turns": turns(whole) if whole else None,
        "turns_settled": turns(settled) if settled else None,
        "changes_settled": len(settled) - 1 if settled else None,
        "targets": whole,
    }


def judge(notes: Notes) -> list[Bar]:
    names = {
        "square wave": f"no flap, square wave of {PERIOD_S:g} s: turns of the target",
        "constant": f"no flap, exactly {REPLICAS} replicas' load: changes of the target, settled",
        "noise": f"no flap, {NOISE:.0%} noise: turns of the target",
    }
    figures = {"square wave": "turns", "constant": "changes_settled", "noise": "turns"}
    bars = [
        at_most(bar, notes.worst(what, figures[what]), 0, f"targets {_told(notes, what)}")
        for what, bar in names.items()
    ]
    counts = [notes.total(what, "wrong") for what in LOADS]
    sent = sum(notes.total(what, "sent") or 0 for what in LOADS)
    wrong = None if None in counts else sum(count or 0 for count in counts)
    return [*bars, at_most("no flap: answers lost, repeated or wrong", wrong, 0, f"{sent:g} answers")]


def _told(notes: Notes, what: str) -> str:
    return "; ".join("-".join(map(str, targets)) for targets in notes.of(what, "targets")) or "not measured"


if __name__ == "__main__":
    sys.exit(main("elastic_flap", measure, judge))
