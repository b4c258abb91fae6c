"""A replica without a model and a clock that jumps, behind the real queue: what becomes of a plan of requests."""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from router.admission import Admission
from router.config import RouterConfig
from router.flight import Flight
from router.forecast import make_queue
from router.types import Request
from tests.router_back.made_requests import make_request
from workers.errors import OverloadedError

TURN_S = 0.002


@dataclass
class Fates:
    """By request: when it was answered, or how it ended else."""

    answered: dict[str, float] = field(default_factory=dict)
    refused: dict[str, OverloadedError] = field(default_factory=dict)
    expired: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    waits: dict[str, float] = field(default_factory=dict)

    def num_ends(self) -> int:
        return len(self.answered) + len(self.refused) + len(self.expired) + len(self.late)


def request(
    name: str,
    at: float,
    *,
    timeout_s: float | None = None,
    tenant: str = "",
    num_tokens: int = 16,
    max_tokens: int = 10,
    priority: int = 0,
) -> Request:
    return make_request(
        range(num_tokens),
        request_id=name,
        max_tokens=max_tokens,
        priority=priority,
        tenant=tenant,
        deadline=at + (600.0 if timeout_s is None else timeout_s),
        has_own_deadline=timeout_s is not None,
        accepted_at=at,
    )


def poisson(rng: random.Random, rate: float, duration_s: float) -> Iterable[float]:
    at = rng.expovariate(rate)
    while at < duration_s:
        yield at
        at += rng.expovariate(rate)


def simulate(plan: Iterable[Request], *, places: int, service_s: float, jitter: float = 0.0, **config: Any) -> Fates:
    """Let a replica that answers `places` requests at a time, each in `service_s`, answer `plan`. `jitter`: how much
    longer it may take now and then, as a share."""
    return _Simulation(RouterConfig(**config), places=places, service_s=service_s, jitter=jitter).run(plan)


class _Simulation:
    def __init__(self, config: RouterConfig, *, places: int, service_s: float, jitter: float) -> None:
        self._places = places
        self._service_s = service_s
        self._jitter = jitter
        self._rng = random.Random(7)
        self._batcher, self._forecast = make_queue(config)
        self._admission = Admission(
            max_queued_tokens=config.max_queued_tokens, max_queued_requests=config.max_queued_requests
        )
        self._numbers = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        self._running: list[tuple[float, int]] = []
        """(end of its answer, key) of those that the replica has."""
        self._fates = Fates()

    def run(self, plan: Iterable[Request]) -> Fates:
        arrivals = deque(sorted(plan, key=lambda one: one.accepted_at))
        num_arrivals, now = len(arrivals), 0.0
        while arrivals or self._flights:
            while self._running and self._running[0][0] <= now:
                self._end(*heapq.heappop(self._running))
            while arrivals and arrivals[0].accepted_at <= now:
                self._arrive(arrivals.popleft(), now)
            for _ in range(2):
                self._expire(now)
                self._send(now)
            if len(self._flights) < 20:
                self._batcher.check_integrity()
            self._forecast.check_integrity(len(self._running))
            now += TURN_S
        self._admission.check_integrity()
        assert self._fates.num_ends() == num_arrivals, "each request ends once"
        return self._fates

    def _end(self, at: float, key: int) -> None:
        flight = self._flights.pop(key)
        name, max_tokens = flight.request.request_id, flight.request.max_tokens
        is_answered = at <= flight.request.deadline
        flight.first_token_at = flight.sent_at + (at - flight.sent_at) / max_tokens
        flight.num_tokens = max_tokens if is_answered else max_tokens - 1
        self._forecast.over(flight, at, is_answered=is_answered, is_lost=False)
        flight.permit.release()
        if is_answered:
            self._fates.answered[name] = at
        else:
            self._fates.late.add(name)

    def _arrive(self, request: Request, now: float) -> None:
        size, tenant = request.num_known_tokens, request.tenant
        try:
            self._forecast.check(request, now)
            while (rival := self._admission.who_gives_way(size, now, tenant=tenant)) is not None:
                newest = self._batcher.newest(rival)
                assert newest is not None
                self._batcher.remove(newest.key, now)
                self._flights.pop(newest.key).permit.release()
                self._fates.refused[newest.request.request_id] = self._admission.refusal(1, now)
            permit = self._admission.admit(size, now, tenant=tenant)
        except OverloadedError as error:
            self._fates.refused[request.request_id] = error
            return
        key = next(self._numbers)
        flight = self._flights[key] = Flight(key, request, cast(Any, None), permit)
        self._batcher.add(self._forecast.queued(flight, now))

    def _expire(self, now: float) -> None:
        for queued in self._batcher.expire(now):
            self._flights.pop(queued.key).permit.release()
            self._fates.expired.add(queued.request.request_id)

    def _send(self, now: float) -> None:
        while batch := self._batcher.next_batch(now, 10_000, credit_sequences=self._places - len(self._running)):
            for queued in itertools.chain.from_iterable(batch.groups):
                flight = self._flights[queued.key]
                self._forecast.sent(flight, queued, now)
                flight.permit.dispatched(now)
                self._fates.waits[queued.request.request_id] = now - queued.request.accepted_at
                takes_s = self._service_s * (1 + self._jitter * self._rng.expovariate(2.0))
                heapq.heappush(self._running, (now + takes_s, queued.key))


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
