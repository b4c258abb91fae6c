"""The router's back: takes requests on, lets them wait as little as possible, places them, delivers what comes of them.

    submit -> Admission -> Batcher -> Placement -> ReplicaLink -> replica
    Sink <------------ deltas, deadlines, cancels, losses <---------'

Owns every request from acceptance to its one end. All of it runs on one event loop: calls, timers and messages come in
as callbacks that never await, so there are no locks and no task per request. Queue and placement are pure and are told
the time. Knows token ids, no text and no public protobuf.

    start    serve    drain (no new requests)    stop (end what is left, close the links)
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from router import dispatch_errors
from router.admission import Admission, Permit
from router.alarm import Alarm
from router.batcher import DispatchBatch
from router.config import RouterConfig
from router.decision_log import DecisionLog
from router.dispatch_spans import DispatchSpans
from router.finish_errors import error_of
from router.fleet import Fleet
from router.flight import Flight
from router.flights import Flights
from router.forecast import make_queue
from router.hello import RouterIdentity
from router.link import LinkTimes, ReplicaLink
from router.placement import LeastCost, Placement, PromptHashes
from router.queued import Queued
from router.replica_wait import ReplicaWait
from router.sender import Sender
from router.types import Backlog, Cancel, ReplicaAddress, ReplicaView, Request, Sink
from router.wire import from_finish, from_logprobs
from workers.errors import CapabilityError, OctavoError
from workers.types import Finish, FinishReason

MAX_LOSSES: Final = 3
"""A request that was on so many replicas when they were lost is not tried again: it may be what kills them."""


class Dispatcher:
    """Implements `router.types.Backend` and `router.link.LinkListener`, on the loop that `start` was called on."""

    def __init__(
        self,
        config: RouterConfig,
        identity: RouterIdentity,
        *,
        rng: random.Random | None = None,
        placement: Placement | None = None,
        link_times: LinkTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._identity = identity
        self._rng = rng or random.Random()
        self._clock = clock
        self._admission = Admission(
            max_queued_tokens=config.max_queued_tokens, max_queued_requests=config.max_queued_requests
        )
        self._batcher, self._forecast = make_queue(config)
        self._fleet = Fleet(
            lambda address, roster: ReplicaLink(address, identity, self, rng=self._rng, times=link_times, roster=roster)
        )
        self._flights = Flights(self._fleet)
        path = config.decision_log
        self._decision_log = DecisionLog(Path(path), identity.router_id) if path else None
        self._sender = Sender(
            self._fleet,
            self._flights,
            placement or LeastCost(self._rng),
            hash_key=identity.keys.prefix_hash,
            log=self._decision_log,
        )
        self._replica_wait = ReplicaWait(config.no_replica_wait_s, clock())
        self._is_draining = False
        self._last_ended = asyncio.Event()
        """Set when no request is left after `drain` began."""
        self._is_stopped = False
        self._is_pump_due = False
        self._alarm = Alarm(self._on_alarm)
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life.

    def start(self) -> None:
        """Serve on the running loop."""
        assert self._loop is None
        self._loop = asyncio.get_running_loop()
        self._replica_wait = ReplicaWait(self._config.no_replica_wait_s, self._clock())
        self._pump_soon()

    def update_replicas(self, replicas: Sequence[ReplicaAddress]) -> None:
        """Take over who is there now. On the loop: others use ``loop.call_soon_threadsafe``. Before `start` and after
        `stop` it has no effect."""
        if self._loop is None or self._is_stopped:
            return
        self._fleet.update(replicas)
        self._pump_soon()

    async def drain(self, grace_s: float) -> bool:
        """Refuse new requests, and wait for those there are, `grace_s` at most. Return whether all have ended."""
        self._is_draining = True
        if not self._flights:
            return True
        try:
            async with asyncio.timeout(grace_s):
                await self._last_ended.wait()
        except TimeoutError:
            return False
        return True

    async def stop(self) -> None:
        """End what is left with UNAVAILABLE and close the links. Idempotent."""
        self._is_draining = self._is_stopped = True
        for flight in self._flights:
            self._end(flight, dispatch_errors.stopping_error())
        self._alarm.cancel()
        # The aborts of what was just ended need not arrive: a replica aborts the works of a router that leaves.
        await self._fleet.close()
        if self._decision_log is not None:
            await asyncio.to_thread(self._decision_log.close)

    # The Backend.

    def submit(self, request: Request, sink: Sink) -> Cancel:
        if self._is_draining:
            raise dispatch_errors.draining_error()
        if missing := self._fleet.lacks(request.needed_capabilities):
            raise dispatch_errors.capability_error(missing)
        now = self._clock()
        self._forecast.check(request, now)
        permit = self._admit(request, now)
        flight = self._flights.add(request, sink, permit)
        flight.hashes = PromptHashes(self._identity.keys.prefix_hash, request)
        flight.spans = DispatchSpans.begin(request, self._identity.router_id, now)
        self._queue(flight, now)
        return partial(self._cancel, flight)

    def replicas(self) -> Sequence[ReplicaView]:
        return self._fleet.views()

    def backlog(self) -> Backlog:
        return self._admission.backlog()

    # The queue.

    def _admit(self, request: Request, now: float) -> Permit:
        """Return a permit; who has more than an equal part of a full backlog gives way. Raises OverloadedError."""
        size = request.num_known_tokens
        while True:
            tenant = self._admission.who_gives_way(size, now, tenant=request.tenant, num_choices=request.n)
            if tenant is None:
                return self._admission.admit(size, now, tenant=request.tenant, num_choices=request.n)
            refusal = self._admission.refusal(size, now)
            newest = self._batcher.newest(tenant)
            if newest is None:
                raise refusal
            self._end_queued(newest, dispatch_errors.gave_way_error(refusal))

    def _queue(self, flight: Flight, now: float) -> None:
        self._batcher.add(self._forecast.queued(flight, now))
        self._pump_soon()

    def _pump_soon(self) -> None:
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
        self._replica_wait.see(now, has_replica=has_ready)
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
        self._arm(now, self._fleet.credit_tokens)

    def _expire(self, now: float) -> None:
        for queued in self._batcher.expire(now):
            request = queued.request
            is_past = request.deadline <= now
            error = dispatch_errors.deadline_error if is_past else dispatch_errors.unreachable_error
            self._end_queued(queued, error(request, now))

    def _next_batch(self, now: float) -> DispatchBatch | None:
        fleet = self._fleet
        return self._batcher.next_batch(
            now, fleet.credit_tokens, credit_sequences=fleet.credit_sequences, block_size=fleet.block_size
        )

    def _dispatch(self, batch: DispatchBatch, now: float) -> list[Queued]:
        """Send a batch; return what has to wait on. (Where all replicas can do the same there is none: somebody has
        credit for each request of a batch.)"""
        left: list[Queued] = []
        for queued in itertools.chain.from_iterable(batch.groups):
            flight = self._flights.find(queued.key)
            if flight is None:  # cancelled by what its neighbour's sink did
                self._forecast.unsent(queued)
                continue
            # Before it goes: its sink may end it while it is told that it has gone.
            self._forecast.sent(flight, queued, now)
            try:
                if not self._sender.send(flight, batch.batch_id, now):
                    self._forecast.recalled(queued)
                    left.append(queued)
            except CapabilityError as error:
                self._forecast.recalled(queued)
                self._end(flight, error)
        return left

    # Time.

    def _arm(self, now: float, credit_tokens: int) -> None:
        """Look at the queue again when the next thing happens by itself."""
        if self._is_stopped:
            return
        events = (
            self._batcher.next_event(credit_tokens, now),
            self._flights.first_deadline(),
            self._replica_wait.next_event(self._batcher.oldest_since),
        )
        self._alarm.set(min((event for event in events if event is not None), default=math.inf), now)

    def _on_alarm(self) -> None:
        now = self._clock()
        while (flight := self._flights.first_late(now)) is not None:
            self._end(flight, dispatch_errors.deadline_error(flight.request, now))
        self._pump()

    # What replicas say: the LinkListener.

    def link_changed(self, link: ReplicaLink) -> None:
        if self._batcher.num_requests or not link.can_send:
            self._pump_soon()

    def link_delivered(self, link: ReplicaLink, deltas: Sequence[pb.WorkDelta]) -> None:
        now = self._clock()
        for delta in deltas:
            flight = self._flights.find_work(delta.work_id, link)
            if flight is None:
                continue  # of an attempt that is over
            if delta.HasField("cached_tokens"):
                flight.sink.cached(delta.cached_tokens)
            if delta.index not in flight.open_choices:
                continue  # of a choice that nobody wants any more
            if delta.token_ids:
                if flight.first_token_at is None:
                    flight.first_token_at, flight.is_untouched = now, False
                flight.num_tokens += len(delta.token_ids)
                logprobs = from_logprobs(delta.logprobs) if delta.logprobs else ()
                flight.sink.tokens(delta.index, list(delta.token_ids), logprobs)
            if delta.HasField("finish") and delta.index in flight.open_choices and not flight.is_ended:
                self._finish(flight, delta.index, from_finish(delta.finish))

    def link_lost(self, link: ReplicaLink, detail: str) -> None:
        for flight in self._fleet.aboard(link):
            flight.num_losses += 1
            self._lose(flight, f"replica {link.replica_id} was lost: {detail}", Reason.REPLICA_LOST)
        self._pump_soon()

    def link_over(self, link: ReplicaLink) -> None:
        self._fleet.forget(link)

    def _finish(self, flight: Flight, index: int, finish: Finish) -> None:
        flight.open_choices.remove(index)
        if finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            flight.is_untouched = False
            flight.sink.finished(index, finish)
            self._end_if_whole(flight)
        elif finish.reason is FinishReason.ERROR and finish.error_reason in (Reason.DRAINING, Reason.REPLICA_LOST):
            if flight.link is not None and finish.error_reason == Reason.DRAINING:
                flight.link.replica_drains()
            self._lose(flight, finish.error_message, finish.error_reason)
        else:
            if not flight.open_choices:
                self._leave(flight)
            self._end(flight, error_of(finish))

    def _end_if_whole(self, flight: Flight) -> None:
        """End a request of which no choice is left: the replica has no more of it."""
        if not flight.open_choices and not flight.is_ended:
            self._leave(flight, is_answered=True)
            self._end(flight, None)

    def _lose(self, flight: Flight, message: str, reason: str) -> None:
        """Its replica will not finish it. Nothing has been said yet: it waits for another one. Else it ends."""
        if flight.is_ended:  # by what the sink of another one did
            return
        self._leave(flight, is_lost=True)
        if not flight.is_untouched or flight.num_losses >= MAX_LOSSES:
            self._end(flight, dispatch_errors.lost_error(message))
            return
        flight.attempt += 1
        flight.open_choices = set(range(flight.request.n)) - flight.cancelled_choices
        flight.permit.requeued()
        if flight.spans is not None:
            flight.spans.requeued(reason)
        self._queue(flight, self._clock())

    # The end of a request.

    def _cancel(self, flight: Flight, index: int | None = None) -> None:
        if index is None:
            self._end(flight, dispatch_errors.cancelled_error())
        elif not flight.is_ended and index in flight.open_choices:
            flight.open_choices.remove(index)
            flight.cancelled_choices.add(index)
            if flight.link is not None:
                flight.link.abort(flight.work_id, index)
            self._end_if_whole(flight)

    def _end_queued(self, queued: Queued, error: OctavoError) -> None:
        """End a request that the batcher has handed back, unless the sink of another one did so meanwhile."""
        flight = self._flights.find(queued.key)
        if flight is not None:
            self._end(flight, error)

    def _end(self, flight: Flight, error: OctavoError | None) -> None:
        """End a request, once, wherever it is. The one place where that happens."""
        if flight.is_ended:
            return
        flight.is_ended = True
        self._flights.remove(flight)
        self._batcher.remove(flight.key, self._clock())
        work_id = flight.work_id
        if (link := self._leave(flight)) is not None:
            link.abort(work_id)
        flight.permit.release()
        if flight.spans is not None:
            flight.spans.ended(error)
        flight.sink.ended(error)
        if self._is_draining and not self._flights:
            self._last_ended.set()

    def _leave(self, flight: Flight, *, is_answered: bool = False, is_lost: bool = False) -> ReplicaLink | None:
        """Take a request off its replica's books, if it is on any; return that link."""
        link = self._flights.leave(flight)
        if link is not None:
            self._forecast.over(flight, self._clock(), is_answered=is_answered, is_lost=is_lost)
        return link

    def check_integrity(self) -> None:
        """Assert that every book agrees with every other; for tests."""
        self._admission.check_integrity()
        self._batcher.check_integrity()
        self._flights.check_integrity()
        num_aboard = len(self._flights.aboard)
        self._forecast.check_integrity(num_aboard)
        assert len(self._flights) == self._batcher.num_requests + num_aboard
        backlog = self.backlog()
        assert backlog.num_queued_requests == self._batcher.num_requests
        assert backlog.num_queued_tokens == self._batcher.num_tokens
        assert backlog.num_running_requests == num_aboard
