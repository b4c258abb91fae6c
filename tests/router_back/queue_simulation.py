"""A replica without a model and a clock that jumps, behind the real queue: what becomes of a plan of requests."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

from router.admission import Admission
from router.config import RouterConfig
from router.flight import Flight
from router.forecast import make_queue
from router.types import Request
from workers.errors import OverloadedError
from workers.types import SamplingParams

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
    return Request(
        request_id=name,
        model="fake",
        prompt=range(num_tokens),
        sampling=SamplingParams(),
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
    rng = random.Random(7)
    settings = RouterConfig(**config)
    batcher, forecast = make_queue(settings)
    admission = Admission(
        max_queued_tokens=settings.max_queued_tokens, max_queued_requests=settings.max_queued_requests
    )
    fates = Fates()
    arrivals = sorted(plan, key=lambda one: one.accepted_at)
    flights: dict[int, Flight] = {}
    running: list[tuple[float, int]] = []
    now, number = 0.0, 0
    while number < len(arrivals) or flights:
        while running and running[0][0] <= now:
            at, key = heapq.heappop(running)
            flight = flights.pop(key)
            is_answered = at <= flight.request.deadline
            taken_s = at - flight.sent_at
            flight.first_token_at = flight.sent_at + taken_s / flight.request.max_tokens
            flight.num_tokens = flight.request.max_tokens if is_answered else flight.request.max_tokens - 1
            forecast.over(flight, at, is_answered=is_answered, is_lost=False)
            flight.permit.release()
            if at <= flight.request.deadline:
                fates.answered[flight.request.request_id] = at
            else:
                fates.late.add(flight.request.request_id)
        while number < len(arrivals) and arrivals[number].accepted_at <= now:
            one, number = arrivals[number], number + 1
            try:
                forecast.check(one, now)
                while (tenant := admission.who_gives_way(one.num_known_tokens, now, tenant=one.tenant)) is not None:
                    newest = batcher.newest(tenant)
                    assert newest is not None
                    batcher.remove(newest.key, now)
                    flights.pop(newest.key).permit.release()
                    fates.refused[newest.request.request_id] = admission.refusal(1, now)
                permit = admission.admit(one.num_known_tokens, now, tenant=one.tenant)
            except OverloadedError as error:
                fates.refused[one.request_id] = error
                continue
            flights[number] = Flight(number, one, cast(Any, None), permit)
            batcher.add(forecast.queued(flights[number], now))
        for _ in range(2):
            for queued in batcher.expire(now):
                flights.pop(queued.key).permit.release()
                fates.expired.add(queued.request.request_id)
            while batch := batcher.next_batch(now, 10_000, credit_sequences=places - len(running)):
                for group in batch.groups:
                    for queued in group:
                        forecast.sent(flights[queued.key], queued, now)
                        flights[queued.key].permit.dispatched(now)
                        fates.waits[queued.request.request_id] = now - queued.request.accepted_at
                        takes_s = service_s * (1 + jitter * rng.expovariate(2.0))
                        heapq.heappush(running, (now + takes_s, queued.key))
        batcher.check_integrity() if len(flights) < 20 else None
        forecast.check_integrity(len(running))
        now += TURN_S
    admission.check_integrity()
    assert fates.num_ends() == len(arrivals), "each request ends once"
    return fates


def percentile(values: Iterable[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)]
