"""What routers' reports say of one model, added up: how many places for sequences there should be. Pure.

Those that run need their places. Of those that wait, as many count as what comes keeps busy beyond these (arrivals x
time at a replica, by Little's law), and the backlog over the time in which it may drain. So a backlog that grows while
replicas start does not ask for ever more of them; one that stays although they are there counts for more and more, and
all that waits counts while nobody knows how long answers take. What was turned away would have run: it counts as having
come, and as waiting.

Replicas say what they have to every router, so the most that one of them says is what runs; what waits is each router's
own. `now` is in seconds, on one clock for all calls.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

from cluster.autoscaling import Demand
from router.signal import REPORT_PERIOD_S, ModelSignal

FRESH_S: Final = 3 * REPORT_PERIOD_S
"""A router that has been silent for longer than another may be dead, and its clients may wait elsewhere already."""
KEEP_S: Final = 2.0
"""Older reports say nothing."""
FORGET_S: Final = 60.0
"""A router that speaks again within this has its counters go on: what came while it was silent has come."""
MIN_WINDOW_S: Final = 0.5
MAX_WINDOW_S: Final = 5.0
"""Arrivals are counted since the backlog began, within these."""
SERVICE_WINDOW_S: Final = 20.0
"""Of time in which something ran; what an answer took before that counts little."""
MIN_DRAIN_S: Final = 10.0
DRAIN_STARTS: Final = 6.0
"""A backlog may take so many times as long to drain as a replica takes to start and to answer: by then all are there,
and a load of five replicas that came at once to none has asked for six at most."""
PROGRESS: Final = 0.9
"""A backlog that has come down to this part of what it was drains."""
IDLE_S: Final = 1.0
"""Since the last arrival."""
_MIN_ENDED: Final = 0.05


class _Part(NamedTuple):
    """What one router said last."""

    epoch: int
    at: float
    signal: ModelSignal


class _Count(NamedTuple):
    at: float
    arrived: int
    turned_away: int


class DemandMeter:
    """Of one model."""

    def __init__(self) -> None:
        self._parts: dict[str, _Part] = {}
        self._arrived = self._turned_away = 0
        """Since this meter was made, by all routers."""
        self._counts: deque[_Count] = deque()
        """Of the last `MAX_WINDOW_S`, and one from before."""
        self._last_arrival_at = -math.inf
        self._served_s = self._ended = 0.0
        """Sequences that have ended, and what they spent at replicas; both fade alike while something runs."""
        self._measured_at: float | None = None
        self._is_running = False
        self._queued_since: float | None = None
        self._least_queued = 0
        self._moved_at = -math.inf
        """When the backlog last became clearly shorter, or a replica was starting."""

    def add(self, router_id: str, epoch: int, signal: ModelSignal, now: float) -> None:
        """Take in what a router has just said."""
        before = self._parts.get(router_id)
        self._parts[router_id] = _Part(epoch, now, signal)
        if before is None or before.epoch != epoch:
            return  # its counters began before this meter did
        old = before.signal
        if (num_arrived := signal.num_arrived_total - old.num_arrived_total) > 0:
            self._arrived += num_arrived
            self._last_arrival_at = now
        self._turned_away += max(signal.num_turned_away_total - old.num_turned_away_total, 0)
        self._ended += max(signal.num_ended_total - old.num_ended_total, 0)
        self._served_s += max(signal.served_s_total - old.served_s_total, 0.0)

    def measure(self, now: float, start_s: float | None = None, *, is_starting: bool = False) -> Demand | None:
        """Return what is asked for by now, where a replica takes `start_s` to start, and some are starting or not; None
        if no router says."""
        self._parts = {name: part for name, part in self._parts.items() if now - part.at <= FORGET_S}
        newest = max((part.at for part in self._parts.values()), default=-math.inf)
        if now - newest > KEEP_S:
            self._measured_at = self._queued_since = None
            return None
        signals = [part.signal for part in self._parts.values() if newest - part.at <= FRESH_S]
        num_running = max(signal.num_aboard for signal in signals)
        num_queued = sum(signal.num_queued for signal in signals)
        self._see(now, num_running, num_queued)
        if is_starting:
            self._moved_at = now
        service_s = self._service_s(signals)
        self._counts.append(_Count(now, self._arrived, self._turned_away))
        arrivals, refusals = self._arrivals(now), self._refusals(now, service_s or 1.0)
        unserved = num_queued + refusals * max(service_s or 1.0, MIN_WINDOW_S)
        at_most = num_running + unserved
        sequences: float = at_most
        if service_s is not None and unserved:
            drain_s = max(MIN_DRAIN_S, DRAIN_STARTS * ((start_s or 0.0) + service_s))
            overdue = min(max((now - self._moved_at) / drain_s - 1, 0.0), 1.0)
            needed = min(arrivals * service_s + num_queued * service_s / drain_s, at_most)
            sequences = needed + overdue * (at_most - needed)
        return Demand(
            sequences=max(sequences, num_running),
            at_most=at_most,
            is_idle=not num_running and not num_queued and now - self._last_arrival_at > IDLE_S,
            cause=_cause(num_running, num_queued, refusals),
        )

    def _service_s(self, signals: list[ModelSignal]) -> float | None:
        """Return how long a sequence is at a replica; None while nobody knows. Where those that run have been there for
        longer than those before, it is that long by now."""
        if self._ended < _MIN_ENDED:
            return None
        ages, count = sum(signal.running_s for signal in signals), sum(signal.num_running for signal in signals)
        return max(self._served_s / self._ended, ages / count if count else 0.0)

    def _see(self, now: float, num_running: int, num_queued: int) -> None:
        """Let the time since the last measurement pass."""
        if self._measured_at is not None and self._is_running:
            fade = math.exp((self._measured_at - now) / SERVICE_WINDOW_S)
            self._served_s *= fade
            self._ended *= fade
        if self._queued_since is None or num_queued < PROGRESS * self._least_queued:
            self._least_queued, self._moved_at = num_queued, now
        if not num_queued:
            self._queued_since = None
        elif self._queued_since is None:
            self._queued_since = now if self._measured_at is None else self._measured_at
        self._measured_at, self._is_running = now, num_running > 0

    def _arrivals(self, now: float) -> float:
        """Return arrivals in a second since the backlog began."""
        while len(self._counts) > 1 and self._counts[1].at <= now - MAX_WINDOW_S:
            self._counts.popleft()
        since = now if self._queued_since is None else self._queued_since
        first = self._count_at(now - min(max(now - since, MIN_WINDOW_S), MAX_WINDOW_S))
        return (self._arrived - first.arrived) / max(now - first.at, MIN_WINDOW_S)

    def _refusals(self, now: float, service_s: float) -> float:
        """Return how many a second were turned away, of those that would still run: one alone is no more than one."""
        window_s = min(max(service_s, MIN_WINDOW_S), MAX_WINDOW_S)
        return (self._turned_away - self._count_at(now - window_s).turned_away) / window_s

    def _count_at(self, at: float) -> _Count:
        """Return the last count that is as old as that, else the oldest."""
        return next((count for count in reversed(self._counts) if count.at <= at), self._counts[0])


def _cause(num_running: int, num_queued: int, refusals: float) -> str:
    parts = [f"{num_running} running", f"{num_queued} waiting"]
    if refusals:
        parts.append(f"{refusals:.1f} a second turned away")
    return ", ".join(parts)
