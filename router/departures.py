"""From the queue to replicas: requests that wait, when they are looked at, and how they leave.

Owns the batcher, what is expected of time, the wait for a first replica, and the one timer of the router's back. What
ends a request is for its `DepartureOwner`. On one event loop; nothing here awaits.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from router import dispatch_errors
from router.admission import Admission, Permit
from router.alarm import Alarm
from router.batcher import DispatchBatch
from router.config import RouterConfig
from router.dispatch_spans import tell_batch
from router.fleet import Fleet
from router.flight import Flight
from router.flights import Flights
from router.forecast import make_queue
from router.link import ReplicaLink
from router.metrics import RouterMetrics
from router.queued import Queued
from router.replica_wait import ReplicaWait, ready_in_s
from router.sender import Sender
from router.signal import ModelOutlook, ModelSignal
from router.traffic import Traffic
from router.types import Backlog, BatchShape, ModelStanding, Request
from router.wait_clock import WaitClock
from workers.errors import CapabilityError, OctavoError


class DepartureOwner(Protocol):
    def end(self, flight: Flight, error: OctavoError | None) -> None:
        """End a request; `remove` is called before this returns."""


class Departures:
    """`clock` is in seconds."""

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        flights: Flights,
        sender: Sender,
        owner: DepartureOwner,
        *,
        clock: Callable[[], float],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._flights = flights
        self._sender = sender
        self._owner = owner
        self._clock = clock
        self.traffic = Traffic()
        self.outlook: Callable[[], ModelOutlook | None] = lambda: None
        """Says what is known of replicas to come."""
        self._batcher, self._forecast = make_queue(config)
        self._replica_wait = ReplicaWait(config.no_replica_wait_s, clock())
        self._waits = WaitClock(clock())
        self.metrics: RouterMetrics | None = None
        """Told of each batch."""
        self._alarm = Alarm(self._on_alarm)
        self._is_pump_due = False
        self._loop: asyncio.AbstractEventLoop | None = None

    def signal(self, backlog: Backlog) -> ModelSignal:
        """Return how it stands, for the cluster's scaling."""
        now, traffic = self._clock(), self.traffic
        return ModelSignal(
            num_queued=backlog.num_queued_sequences,
            queued_tokens=backlog.num_queued_tokens,
            num_running=traffic.num_running,
            num_aboard=self._fleet.num_aboard_all,
            owed_prefill_tokens=self._fleet.owed_tokens,
            oldest_wait_s=self.oldest_wait_s,
            num_arrived_total=traffic.num_arrived,
            num_turned_away_total=traffic.num_turned_away,
            num_ended_total=traffic.num_ended,
            served_s_total=traffic.served_s,
            running_s=traffic.running_s(now),
            num_ready=self._fleet.num_ready,
        )

    def standing(self, backlog: Backlog) -> ModelStanding:
        """Return how it stands, for gauges."""
        roster = self._fleet.roster
        queued, tokens, running = backlog.num_queued_requests, backlog.num_queued_tokens, backlog.num_running_requests
        credit_tokens, num_blocks = max(roster.credit_tokens, 0), roster.index.num_entries
        return ModelStanding(queued, tokens, self.oldest_wait_s, running, credit_tokens, num_blocks)

    @property
    def oldest_wait_s(self) -> float:
        """How long the one that has waited longest has; 0 without one."""
        oldest = self._batcher.oldest_since
        return 0.0 if oldest is None else self._clock() - oldest

    @property
    def num_waiting(self) -> int:
        return self._batcher.num_requests

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens."""
        return self._batcher.num_tokens

    def start(self) -> None:
        """Let requests go, on the running loop."""
        self._loop = asyncio.get_running_loop()
        self._replica_wait = ReplicaWait(self._config.no_replica_wait_s, self._clock())
        self.pump_soon()

    def stop(self) -> None:
        """Nothing goes any more."""
        self._loop = None
        self._alarm.cancel()

    def permit(self, request: Request, admission: Admission, now: float) -> Permit:
        """Return a permit; who has more than an equal part of a full backlog gives way.

        Raises OverloadedError when the backlog is full, or `request` would be late; UnavailableError when it would be
        before any replica is ready, or when none has ever started and they fail to.
        """
        self.traffic.num_arrived += request.n
        try:
            return self._permit(request, admission, now)
        except OctavoError:
            if self._forecast.could_be_in_time(request, now):
                self.traffic.num_turned_away += request.n
            raise

    def _permit(self, request: Request, admission: Admission, now: float) -> Permit:
        self._forecast.check(request, now)
        if not self._fleet.has_ready:
            outlook = self.outlook()
            if outlook is not None and outlook.failure and outlook.start_s is None:
                raise dispatch_errors.model_error(request.model, outlook.failure)
            expected_s, left_s = ready_in_s(outlook), request.deadline - now
            if expected_s is not None and expected_s > left_s:
                raise dispatch_errors.start_error(expected_s, left_s)
        size = request.num_known_tokens
        while True:
            tenant = admission.who_gives_way(size, now, tenant=request.tenant, num_choices=request.n)
            if tenant is None:
                return admission.admit(size, now, tenant=request.tenant, num_choices=request.n)
            refusal = admission.refusal(size, now)
            newest = self._batcher.newest(tenant)
            if newest is None:
                raise refusal
            self._end_queued(newest, dispatch_errors.gave_way_error(refusal))

    def add(self, flight: Flight, now: float) -> None:
        """Let `flight` wait, as short as possible."""
        num_waiting = self._batcher.num_requests
        if not num_waiting:
            self._look(now)
        flight.mark = self._waits.begin(now, num_waiting)
        self._batcher.add(self._forecast.queued(flight, now))
        self.pump_soon()

    def remove(self, flight: Flight, now: float) -> None:
        """It does not wait any more, if it did."""
        self._batcher.remove(flight.key, now)

    def leave(self, flight: Flight, *, is_answered: bool = False, is_lost: bool = False) -> ReplicaLink | None:
        """Take a request off its replica's books, if it is on any; return that link."""
        link = self._flights.leave(flight)
        if link is not None:
            now = self._clock()
            flight.left(now)
            self.traffic.left(flight.request.n, flight.sent_at, now)
            self._forecast.over(flight, now, is_answered=is_answered, is_lost=is_lost)
        return link

    def pump_soon(self) -> None:
        """Pump at the end of this turn of the loop, so that what arrives together goes together."""
        if not self._is_pump_due and self._loop is not None:
            self._is_pump_due = True
            self._loop.call_soon(self._pump)

    def _pump(self) -> None:
        """Send what can be sent now, and see to it that the rest is looked at in time."""
        self._is_pump_due = False
        now = self._clock()
        self._expire(now)
        has_ready = self._fleet.has_ready
        self._replica_wait.see(now, has_replica=has_ready, outlook=None if has_ready else self.outlook())
        left: list[Queued] = []
        while has_ready and (batch := self._next_batch(now)) is not None:
            left += self._dispatch(batch, now)
        self._expire(now)
        for queued in left:
            if self._flights.find(queued.key) is not None:
                self._batcher.add(replace(queued, since=now))
        if (limit := self._replica_wait.overdue_since(now)) is not None:
            for queued in self._batcher.waiting_since(limit, now):
                self._end_queued(queued, dispatch_errors.no_replica_error(self._replica_wait.max_wait_s))
        self._look(now)
        self._arm(now, self._fleet.credit_tokens)

    def _look(self, now: float) -> None:
        """Note what keeps those that wait, from now on."""
        has_room = self._fleet.credit_tokens > 0 and self._fleet.credit_sequences > 0
        self._waits.see(now, has_replica=self._fleet.has_ready, has_room=has_room)

    def _expire(self, now: float) -> None:
        for queued in self._batcher.expire(now):
            request = queued.request
            is_past = request.deadline <= now
            error = dispatch_errors.deadline_error if is_past else dispatch_errors.unreachable_error
            self._end_queued(queued, error(request, now))

    def _next_batch(self, now: float) -> DispatchBatch | None:
        fleet = self._fleet
        return self._batcher.next_batch(
            now,
            fleet.credit_tokens,
            credit_sequences=fleet.credit_sequences,
            block_size=fleet.block_size,
            at_hand=fleet.roster.has_at_hand,
        )

    def _dispatch(self, batch: DispatchBatch, now: float) -> list[Queued]:
        """Send a batch; return what has to wait on. (Where all replicas can do the same there is none: somebody has
        credit for each request of a batch.)"""
        left: list[Queued] = []
        gone: list[Flight] = []
        shape = BatchShape(batch.batch_id, sum(map(len, batch.groups)), batch.num_tokens)
        for queued in itertools.chain.from_iterable(batch.groups):
            flight = self._flights.find(queued.key)
            if flight is None:  # cancelled by what its neighbour's sink did
                self._forecast.unsent(queued)
                continue
            # Before it goes: its sink may end it while it is told that it has gone.
            flight.sent_at = now
            self._forecast.sent(flight, queued, now)
            self.traffic.boarded(flight.request.n, now)
            try:
                assert flight.mark is not None, "who is sent has waited"
                if self._sender.send(flight, shape, self._waits.wait(flight.mark, now), now):
                    self._waits.gone()
                    gone.append(flight)
                else:
                    self._recall(queued, now)
                    left.append(queued)
            except CapabilityError as error:
                self._recall(queued, now)
                self._owner.end(flight, error)
        if gone:
            num_tokens = min(batch.num_tokens, sum(flight.request.num_known_tokens for flight in gone))
            shape = BatchShape(batch.batch_id, len(gone), num_tokens)  # who has to wait on counts when it goes
            if self.metrics is not None:
                self.metrics.batch_left(gone[0].request.model, shape)
            if traced := [flight.spans for flight in gone if flight.spans is not None]:
                tell_batch(shape, traced, self._clock() - now)
        return left

    def _recall(self, queued: Queued, now: float) -> None:
        """It was to go now and has not gone."""
        self._forecast.recalled(queued)
        self.traffic.recalled(queued.request.n, now)

    def _end_queued(self, queued: Queued, error: OctavoError) -> None:
        """End a request that the batcher has handed back, unless the sink of another one did so meanwhile."""
        flight = self._flights.find(queued.key)
        if flight is not None:
            self.traffic.num_turned_away += queued.request.n
            self._owner.end(flight, error)

    def _arm(self, now: float, credit_tokens: int) -> None:
        """Look at the queue again when the next thing happens by itself."""
        if self._loop is None:
            return
        events = (
            self._batcher.next_event(credit_tokens, now),
            self._flights.first_deadline(),
            self._replica_wait.next_event(self._batcher.oldest_since, now),
        )
        self._alarm.set(min((event for event in events if event is not None), default=math.inf), now)

    def _on_alarm(self) -> None:
        now = self._clock()
        while (flight := self._flights.first_late(now)) is not None:
            self._owner.end(flight, dispatch_errors.deadline_error(flight.request, now))
        self._pump()

    def check_integrity(self) -> None:
        """Assert that every book agrees with every other; for tests."""
        self._batcher.check_integrity()
        num_aboard = len(self._flights.aboard)
        assert self.traffic.num_running == sum(flight.request.n for flight in self._flights.aboard)
        self._forecast.check_integrity(num_aboard)
        assert len(self._flights) == self.num_waiting + num_aboard
