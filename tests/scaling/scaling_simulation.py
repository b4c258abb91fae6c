"""A cluster without a cluster: load, routers that report, a board that decides, replicas that take time to start.

Everything but the board is a model: a replica has `PLACES` for sequences, each of which takes `service_s`. What finds
no place waits in its router, and beyond `max_queued` is turned away. Time goes in ticks of 50 ms, the same each time.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.autoscaling import ScalingConfig
from cluster.signal_board import SignalBoard, StartProgress
from router.signal import REPORT_PERIOD_S, ModelSignal, RouterReport
from workers.start import READY

TICK_S = 0.05
START = 1_000_000_000.0
MODEL = "toy"
PLACES = 10

Load = Callable[[float], float]


@dataclass
class SimulatedRouter:
    name: str
    offset_s: float
    queue: deque[int] = field(default_factory=deque)
    num_arrived: int = 0
    num_turned_away: int = 0
    num_ended: int = 0
    served_s: float = 0.0
    running: list[float] = field(default_factory=list)
    """When each ends; a heap."""
    reported_at: float = -1.0


@dataclass(kw_only=True)
class Simulation:
    """`rate`: sequences that come in a second, whatever becomes of them. `clients`: sequences that are there at any
    time, each followed by another one when it ends."""

    scaling: ScalingConfig
    num_replicas: int = 1
    start_s: float = 3.0
    service_s: float = 1.0
    max_queued: int = 4_096
    num_routers: int = 1
    knows_start: bool = True
    rng: random.Random | None = None
    """Arrivals come by chance (a Poisson process); None: at equal distances."""

    def __post_init__(self) -> None:
        self.now = 0.0
        self.config = self.scaling.of_replicas(self.num_replicas, PLACES)
        self.board = SignalBoard(START)
        if self.knows_start:
            self._tell_start(START)
        self.target = self.num_replicas
        self.ready = self.num_replicas
        self.starting: list[float] = []
        """When each is ready."""
        self.routers = [
            SimulatedRouter(f"router-{i}", i * REPORT_PERIOD_S / max(self.num_routers, 1))
            for i in range(self.num_routers)
        ]
        self.targets: list[tuple[float, int]] = [(0.0, self.num_replicas)]
        """Each change of the target, and when."""
        self.reasons: list[str] = []
        self.is_silent = False
        """No report reaches the board."""
        self._due = 0.0
        self.backlog_at: float | None = None
        """When something waited first."""

    def run(self, seconds: float, *, rate: Load | None = None, clients: Load | None = None) -> Simulation:
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now = round(self.now + TICK_S, 6)
            self._serve()
            self._arrive(rate, clients)
            self._fill()
            self._report()
            self._decide()
        return self

    def kill_router(self) -> None:
        """The first router dies: replicas end what it had, and its clients come to the others."""
        dead = self.routers.pop(0)
        again = len(dead.queue) + len(dead.running)
        for i in range(again):
            self._take(self.routers[i % len(self.routers)])

    @property
    def num_queued(self) -> int:
        return sum(len(router.queue) for router in self.routers)

    @property
    def num_running(self) -> int:
        return sum(len(router.running) for router in self.routers)

    @property
    def highest(self) -> int:
        return max(target for _, target in self.targets)

    def since(self, at: float) -> list[int]:
        """Return the targets that there were after `at`."""
        before = [target for time, target in self.targets if time <= at]
        return before[-1:] + [target for time, target in self.targets if time > at]

    def reached_at(self, target: int) -> float:
        """Return when the target was that high first."""
        return next(at for at, each in self.targets if each >= target)

    def _arrive(self, rate: Load | None, clients: Load | None) -> None:
        count = 0
        if rate is not None:
            self._due += rate(self.now) * TICK_S
            if self.rng is not None:
                count = _poisson(self.rng, rate(self.now) * TICK_S)
            else:
                count = int(self._due + 1e-9)
                self._due -= count
        if clients is not None:
            count = int(clients(self.now)) - self.num_running - self.num_queued
        for i in range(count):
            self._take(self.routers[i % len(self.routers)])

    def _take(self, router: SimulatedRouter) -> None:
        router.num_arrived += 1
        if len(router.queue) >= self.max_queued:
            router.num_turned_away += 1
        else:
            router.queue.append(1)

    def _serve(self) -> None:
        for router in self.routers:
            while router.running and router.running[0] <= self.now:
                heapq.heappop(router.running)
                router.num_ended += 1
                router.served_s += self.service_s
        started = sum(at <= self.now for at in self.starting)
        self.starting = [at for at in self.starting if at > self.now]
        self.ready += started
        if started:
            self._tell_start(START + self.now)

    def _fill(self) -> None:
        free = self.ready * PLACES - self.num_running
        while free > 0 and any(router.queue for router in self.routers):
            for router in self.routers:
                if router.queue and free > 0:
                    router.queue.popleft()
                    heapq.heappush(router.running, round(self.now + self.service_s, 6))
                    free -= 1
        if self.num_queued and self.backlog_at is None:
            self.backlog_at = self.now

    def _report(self) -> None:
        for router in self.routers:
            if self.now - router.reported_at < REPORT_PERIOD_S - 1e-9 or self.now < router.offset_s:
                continue
            router.reported_at = self.now
            signal = ModelSignal(
                num_queued=len(router.queue),
                num_running=len(router.running),
                num_aboard=self.num_running,
                num_arrived_total=router.num_arrived,
                num_turned_away_total=router.num_turned_away,
                num_ended_total=router.num_ended,
                served_s_total=router.served_s,
                running_s=sum(self.now - (end - self.service_s) for end in router.running),
                num_ready=self.ready,
            )
            if not self.is_silent:
                self.board.report(
                    RouterReport(router_id=router.name, epoch=1, models={MODEL: signal}), START + self.now
                )

    def _decide(self) -> None:
        if round(self.now / TICK_S) % 2:
            return
        target, change = self.board.desired(
            MODEL, self.config, START + self.now, current=self.ready, target=self.target
        )
        if change is None:
            return
        self.reasons.append(change.reason)
        self.targets.append((self.now, target))
        self.target = target
        missing = target - self.ready - len(self.starting)
        self.starting += [self.now + self.start_s] * max(missing, 0)
        while self.starting and self.ready + len(self.starting) > target:
            self.starting.pop()
        self.ready = min(self.ready, target)

    def _tell_start(self, now: float) -> None:
        self.board.progress(StartProgress(model=MODEL, replica_id="a", stage=READY, age_s=self.start_s), now)


def _poisson(rng: random.Random, mean: float) -> int:
    count, left = 0, rng.expovariate(1.0)
    while left < mean:
        count += 1
        left += rng.expovariate(1.0)
    return count
