"""The highest rate at which a scenario still keeps what is asked of it: doubling, then halving the interval.

Pure: `trial(rate)` says whether a rate holds, however that is found out.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

MAX_TRIALS = 16


@dataclass(frozen=True, slots=True)
class MaxRate:
    """`holds` is the highest rate that was seen to hold, None if none did; `breaks` the lowest that did not."""

    holds: float | None
    breaks: float | None


async def search_max_rate(
    trial: Callable[[float], Awaitable[bool]],
    *,
    start: float,
    precision: float = 0.05,
    max_trials: int = MAX_TRIALS,
) -> MaxRate:
    """Search from `start` on, until the two are within `precision` of one another or after `max_trials` trials."""
    holds: float | None = None
    breaks: float | None = None
    rate = start
    for _ in range(max_trials):
        if await trial(rate):
            holds = rate
        else:
            breaks = rate
        if holds is None:
            rate /= 2
        elif breaks is None:
            rate *= 2
        elif breaks <= holds * (1 + precision):
            break
        else:
            rate = (holds * breaks) ** 0.5
    return MaxRate(holds, breaks)
