"""What the router expects of time: how long answers take, who would be late, and who is told so at once.

Joins what attempts showed (`speeds`) with what waits (`batcher`, `order`). A request is refused at once if its client's
own deadline cannot be met, or only at the cost of one that was taken on before; nobody without a deadline of their own
is ever refused for time, nor is anybody while nothing is known. Pure: `now` is an argument.
"""

from __future__ import annotations

import math
from typing import Protocol

from router import dispatch_errors
from router.batcher import Batcher
from router.config import RouterConfig
from router.flight import Flight
from router.order import ArrivalOrder, FairOrder
from router.queued import Queued
from router.speeds import Speeds
from router.types import Request


class Forecast(Protocol):
    def check(self, request: Request, now: float) -> None:
        """Raises OverloadedError if `request` would be late."""

    def could_be_in_time(self, request: Request, now: float) -> bool:
        """Say whether `request` could be answered in time if nothing waited before it, as far as is known."""

    def queued(self, flight: Flight, now: float) -> Queued:
        """Return `flight` as it waits from `now` on."""

    def sent(self, flight: Flight, queued: Queued, now: float) -> None:
        """An attempt begins; `over` or `recalled` follows once."""

    def unsent(self, queued: Queued) -> None:
        """It was its turn, but nothing was sent."""

    def recalled(self, queued: Queued) -> None:
        """Nothing was sent after `sent`."""

    def over(self, flight: Flight, now: float, *, is_answered: bool, is_lost: bool) -> None:
        """The attempt has ended, with all of its answer or without. Of one that was lost its tenant owes nothing."""

    def check_integrity(self, num_aboard: int) -> None:
        """Assert that every attempt that began has ended or is one of `num_aboard`; for tests."""


class NoForecast:
    """Expects nothing and refuses nobody."""

    def check(self, request: Request, now: float) -> None:
        pass

    def could_be_in_time(self, request: Request, now: float) -> bool:
        return True

    def queued(self, flight: Flight, now: float) -> Queued:
        request = flight.request
        return Queued(
            key=flight.key, request=request, attempt=flight.attempt, since=now, cost=max(request.num_known_tokens, 1)
        )

    def sent(self, flight: Flight, queued: Queued, now: float) -> None:
        pass

    def unsent(self, queued: Queued) -> None:
        pass

    def recalled(self, queued: Queued) -> None:
        pass

    def over(self, flight: Flight, now: float, *, is_answered: bool, is_lost: bool) -> None:
        pass

    def check_integrity(self, num_aboard: int) -> None:
        pass


class MeasuredForecast:
    def __init__(self, order: FairOrder, batcher: Batcher, speeds: Speeds) -> None:
        self._order = order
        self._batcher = batcher
        self._speeds = speeds

    def check(self, request: Request, now: float) -> None:
        if not request.has_own_deadline or (service_s := self._speeds.service_s(request, now)) is None:
            return
        shortfall_s = now + service_s - request.deadline
        if self._batcher.is_held:
            shortfall_s = max(shortfall_s, self._queue_shortfall_s(request, service_s, now))
        if shortfall_s > 0:
            raise dispatch_errors.too_short_error(request, now, service_s=service_s, shortfall_s=shortfall_s)

    def could_be_in_time(self, request: Request, now: float) -> bool:
        service_s = self._speeds.service_s(request, now)
        return service_s is None or now + service_s <= request.deadline

    def queued(self, flight: Flight, now: float) -> Queued:
        request = flight.request
        latest_start = math.inf
        if request.has_own_deadline:
            latest_start = self._latest_start(request, self._speeds.service_s(request, now))
        return Queued(
            key=flight.key,
            request=request,
            attempt=flight.attempt,
            since=now,
            cost=self._speeds.cost(request),
            latest_start=latest_start,
            hashes=flight.hashes,
        )

    def sent(self, flight: Flight, queued: Queued, now: float) -> None:
        flight.charge = queued.cost
        flight.sent_at = now
        flight.first_token_at = None
        flight.num_tokens = 0
        self._speeds.num_sent += 1

    def unsent(self, queued: Queued) -> None:
        self._order.left(queued.request.tenant, queued.request.n)
        self._order.settle(queued.request.priority, queued.request.tenant, -queued.cost)

    def recalled(self, queued: Queued) -> None:
        self._speeds.num_sent -= 1
        self.unsent(queued)

    def over(self, flight: Flight, now: float, *, is_answered: bool, is_lost: bool) -> None:
        request, num_tokens = flight.request, flight.num_tokens
        self._speeds.over(
            request,
            now,
            elapsed_s=now - flight.sent_at,
            first_token_s=None if flight.first_token_at is None else flight.first_token_at - flight.sent_at,
            num_tokens=round(num_tokens / request.n),
            is_answered=is_answered,
        )
        if is_answered:
            self._order.answered(now - flight.sent_at)
        self._order.left(request.tenant, request.n)
        used = 0 if is_lost else request.num_known_tokens + num_tokens
        self._order.settle(request.priority, request.tenant, used - flight.charge)

    def _queue_shortfall_s(self, request: Request, service_s: float, now: float) -> float:
        return self._order.shortfall_s(
            request.priority,
            request.tenant,
            self._speeds.cost(request),
            self._latest_start(request, service_s),
            now,
            self._batcher.backlog_s(now),
        )

    def _latest_start(self, request: Request, service_s: float | None) -> float:
        return request.deadline if service_s is None else request.deadline - service_s - self._speeds.margin_s

    def check_integrity(self, num_aboard: int) -> None:
        assert self._speeds.num_sent == num_aboard
        assert self._order.num_held >= num_aboard
        assert num_aboard or not self._order.num_held


def make_queue(config: RouterConfig) -> tuple[Batcher, Forecast]:
    """Return the queue that `config` asks for, and what is expected of it."""
    if not config.batching:
        plain = Batcher(
            ArrivalOrder(), max_batch_tokens=config.max_batch_tokens, max_batch_requests=1, max_batch_wait_s=0.0
        )
        return plain, NoForecast()
    order, speeds = FairOrder(), Speeds()
    batcher = Batcher(
        order,
        max_batch_tokens=config.max_batch_tokens,
        max_batch_requests=config.max_batch_requests,
        max_batch_wait_s=config.max_batch_wait_s,
        speeds=speeds,
    )
    return batcher, MeasuredForecast(order, batcher, speeds)
