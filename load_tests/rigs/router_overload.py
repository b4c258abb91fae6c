"""Ten times more than a replica can do, with deadlines: how much of its capacity is answered in time, and what is late.

A fake replica of 60 requests a second is offered 600 for a minute, with deadlines of 0.5 to 3 s. Goodput counts answers
within their deadlines, over the time until the last request has ended.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import in_ms, send
from load_tests.rigs.router_rig import RigConfig, RouterRig

SEQUENCES, STEP_S, OUTPUT = 12, 0.02, 10
CAPACITY = SEQUENCES / (STEP_S * OUTPUT)
"""Requests a second: 60."""
RATE = 600
MIN_GOODPUT = 0.9
MAX_GROWTH = 1.05


async def measure(settings: Settings, notes: Notes) -> None:
    # On time to the step, as a device that computes would be; a sleep of step_s and the loop's work would be longer.
    with RouterRig(RigConfig(step_s=STEP_S, num_sequences=SEQUENCES, tells_time=True)) as rig:
        seconds = settings.seconds(60.0, 3.0)
        load = await send(rig, "router_overload", {"arrivals.rate": RATE, "arrivals.duration_s": seconds})
        notes.add(
            "overload",
            **load.counts(),
            goodput_per_s=load.figures["goodput_per_s"],
            first_token_p99_ms=in_ms(load.figures["first_token_s.p99"]),
            growth=growth(load.router_bytes),
            router_mb=max(load.router_bytes, default=0.0) / 1e6,
        )


def growth(samples: Sequence[float]) -> float | None:
    """Return the memory at the end over that at a third of the time, each the median of a tenth of the samples."""
    width = max(len(samples) // 10, 1)
    third = samples[len(samples) // 3 :][:width]
    return statistics.median(samples[-width:]) / statistics.median(third) if third else None


def judge(notes: Notes) -> list[Bar]:
    goodput = notes.median("overload", "goodput_per_s")
    errors = notes.of("overload", "errors")
    refusals = ", ".join(f"{count} {reason}" for reason, count in errors[0].items()) if errors else "not measured"
    size = figure(notes.median("overload", "router_mb"), "MB at most")
    return [
        at_least(
            "overload: goodput, share of capacity",
            ratio(goodput, CAPACITY),
            MIN_GOODPUT,
            f"{figure(goodput, 'answers/s in time')} of {CAPACITY:g}, {RATE} offered; {refusals}",
        ),
        at_most("overload: late and answered OK", notes.total("overload", "late"), 0),
        at_most("overload: memory of the router, end / a third", notes.worst("overload", "growth"), MAX_GROWTH, size),
        at_most("overload: s until idle", notes.worst("overload", "idle_s"), 1.0),
    ]


if __name__ == "__main__":
    sys.exit(main("router_overload", measure, judge))
