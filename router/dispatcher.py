"""The router's back: takes requests on, lets them wait as little as possible, places them, delivers what comes of them.

    submit -> Admission -> Departures (queue, placement) -> ReplicaLink -> replica
    Sink <------------ deltas, deadlines, cancels, losses <---------'

Owns every request from acceptance to its one end. All of it runs on one event loop: calls, timers and messages come in
as callbacks that never await, so there are no locks and no task per request. Knows token ids, no text and no public
protobuf.

    start    serve    drain (no new requests)    stop (end what is left, close the links)
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from router import dispatch_errors
from router.admission import Admission
from router.config import RouterConfig
from router.decision_log import DecisionLog
from router.departures import Departures
from router.dispatch_spans import DispatchSpans
from router.finish_errors import error_of
from router.fleet import Fleet
from router.flight import Flight
from router.flights import Flights
from router.hello import RouterIdentity
from router.link import LinkTimes, ReplicaLink
from router.metrics import RouterMetrics
from router.placement import LeastCost, Placement, PromptHashes
from router.resume import continued, finish_of
from router.sender import Sender
from router.signal import ModelOutlook, ModelSignal
from router.types import Backlog, Cancel, ModelStanding, ReplicaAddress, ReplicaView, Request, Sink
from router.wire import from_finish, from_logprobs, from_tokens
from workers.errors import OctavoError
from workers.types import CAPABILITY_GENERATE, Finish, FinishReason

MAX_IDLE_LOSSES: Final = 3
"""A request that was on so many replicas when they were lost, one after the other and without a token from any of them,
is not tried again: it may be what kills them."""
MAX_LOSSES: Final = 32
"""The same with tokens in between."""
_GENERATES: Final = frozenset({CAPABILITY_GENERATE})


class Dispatcher:
    """Implements `Backend` of types.py, `LinkListener` of link.py and `DepartureOwner` of departures.py, on the loop
    that `start` was called on."""

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
        self._identity = identity
        self._rng = rng or random.Random()
        self._clock = clock
        self._admission = Admission(
            max_queued_tokens=config.max_queued_tokens, max_queued_requests=config.max_queued_requests
        )
        self._fleet = Fleet(
            lambda address, roster: ReplicaLink(address, identity, self, rng=self._rng, times=link_times, roster=roster)
        )
        self._flights = Flights(self._fleet)
        path = config.decision_log
        self._decision_log = DecisionLog(Path(path), identity.router_id) if path else None
        placement = placement or LeastCost(self._rng)
        self._sender = Sender(self._fleet, self._flights, placement, log=self._decision_log)
        self._departures = Departures(config, self._fleet, self._flights, self._sender, self, clock=clock)
        self._is_draining = False
        self._last_ended = asyncio.Event()
        """Set when no request is left after `drain` began."""
        self._is_started = False
        self._is_stopped = False

    # Life.

    def start(self) -> None:
        """Serve on the running loop."""
        assert not self._is_started
        self._is_started = True
        self._departures.start()

    def update_replicas(self, replicas: Sequence[ReplicaAddress]) -> None:
        """Take over who is there now. On the loop: others use ``loop.call_soon_threadsafe``. Before `start` and after
        `stop` it has no effect."""
        if self._is_started and not self._is_stopped:
            self._fleet.update(replicas)
            self._departures.pump_soon()

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
            self.end(flight, dispatch_errors.stopping_error())
        self._departures.stop()
        # The aborts of what was just ended need not arrive: a replica aborts the works of a router that leaves.
        await self._fleet.close()
        if self._decision_log is not None:
            await asyncio.to_thread(self._decision_log.close)

    # The Backend.

    def submit(self, request: Request, sink: Sink) -> Cancel:
        if self._is_draining:
            raise dispatch_errors.draining_error()
        if missing := self._fleet.lacks(request.needed_capabilities or _GENERATES):
            raise dispatch_errors.capability_error(missing)
        now = self._clock()
        permit = self._departures.permit(request, self._admission, now)
        flight = self._flights.add(request, sink, permit)
        flight.hashes = PromptHashes(self._identity.keys.prefix_hash, request)
        flight.spans = DispatchSpans.begin(request, self._identity.router_id)
        self._departures.add(flight, now)
        return partial(self._cancel, flight)

    def replicas(self) -> Sequence[ReplicaView]:
        return self._fleet.views()

    def backlog(self) -> Backlog:
        return self._admission.backlog()

    # The cluster's scaling.

    def look_out(self, outlook: Callable[[], ModelOutlook | None]) -> None:
        """Ask `outlook` from now on what is known of this model's replicas to come."""
        self._departures.outlook = outlook

    def signal(self, model: str) -> ModelSignal:
        """`model` is the one that it serves."""
        return self._departures.signal(self.backlog())

    # Telemetry.

    def measure(self, metrics: RouterMetrics | None) -> None:
        """Tell `metrics` from now on of batches and placements."""
        self._departures.metrics = self._sender.metrics = metrics

    def standing(self, model: str) -> ModelStanding:
        """`model` is the one that it serves."""
        return self._departures.standing(self.backlog())

    # What replicas say: the LinkListener.

    def link_changed(self, link: ReplicaLink) -> None:
        if self._departures.num_waiting or not link.can_send:
            self._departures.pump_soon()

    def link_delivered(self, link: ReplicaLink, batch: pb.StepBatch) -> None:
        now, find_work = self._clock(), self._flights.find_work
        for delta in batch.deltas:
            flight = find_work(delta.work_id, link)
            if flight is None:
                continue  # of an attempt that is over
            if delta.HasField("cached_tokens"):
                flight.sink.cached(delta.cached_tokens)
            if delta.index not in flight.open_choices:
                continue  # of a choice that nobody wants any more
            if delta.token_ids:
                flight.count(len(delta.token_ids), now)
                logprobs = from_logprobs(delta.logprobs) if delta.logprobs else ()
                flight.sink.tokens(delta.index, list(delta.token_ids), logprobs)
            if delta.pooled:
                flight.sink.pooled(delta.index, list(delta.pooled))
            if delta.HasField("finish") and delta.index in flight.open_choices and not flight.is_ended:
                self._finish(flight, delta.index, from_finish(delta.finish))
        for number, token_ids in from_tokens(batch.tokens):
            flight = find_work(number, link)
            if flight is not None and token_ids and 0 in flight.open_choices:
                flight.count(len(token_ids), now)
                flight.sink.tokens(0, token_ids, ())

    def link_lost(self, link: ReplicaLink, detail: str) -> None:
        for flight in self._fleet.aboard(link):
            flight.lost()
            self._lose(flight, f"replica {link.replica_id} was lost: {detail}", Reason.REPLICA_LOST)
        self._departures.pump_soon()

    def link_over(self, link: ReplicaLink) -> None:
        self._fleet.forget(link)

    def _finish(self, flight: Flight, index: int, finish: Finish) -> None:
        if finish.reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._close(flight, index)
            flight.sink.finished(index, finish)
            self._end_if_whole(flight)
        elif finish.reason is FinishReason.ERROR and finish.error_reason in (Reason.DRAINING, Reason.REPLICA_LOST):
            if finish.error_reason == Reason.REPLICA_LOST:
                flight.lost()
            elif flight.link is not None:
                flight.link.replica_drains()
            self._lose(flight, finish.error_message, finish.error_reason)
        else:
            flight.open_choices.remove(index)
            if not flight.open_choices:
                self._departures.leave(flight)
            self.end(flight, error_of(finish))

    def _end_if_whole(self, flight: Flight) -> None:
        """End a request of which no choice is left: the replica has no more of it."""
        if not flight.open_choices and not flight.is_ended:
            self._departures.leave(flight, is_answered=True)
            self.end(flight, None)

    def _lose(self, flight: Flight, message: str, reason: str) -> None:
        """Its replica will not finish it: it waits for another one, which goes on after the tokens that there are."""
        if flight.is_ended:  # by what the sink of another one did
            return
        request, sink = flight.request, flight.sink
        self._departures.leave(flight, is_lost=True)
        if flight.record is not None:
            flight.record.loss_reason, flight.record.loss = reason, message
        flight.open_choices = set(range(request.n)) - flight.closed_choices
        for index in sorted(flight.open_choices):
            finish = finish_of(sink.known(index), request)
            if finish is not None and index in flight.open_choices:
                self._close(flight, index)
                sink.finished(index, finish)
            if flight.is_ended:  # the sink has all it wants
                return
        if not flight.open_choices:
            self.end(flight, None)
            return
        request = continued(request, sink.known, flight.open_choices)
        is_hopeless = flight.num_idle_losses >= MAX_IDLE_LOSSES or flight.num_losses >= MAX_LOSSES
        if is_hopeless or self._fleet.lacks(request.needed_capabilities):
            self.end(flight, dispatch_errors.lost_error(message))
            return
        flight.go_on(request, PromptHashes(self._identity.keys.prefix_hash, request))
        flight.permit.requeued(request.num_known_tokens)
        if flight.spans is not None:
            flight.spans.requeued(reason, sum(map(len, request.received)))
        self._departures.add(flight, self._clock())

    @staticmethod
    def _close(flight: Flight, index: int) -> None:
        flight.open_choices.remove(index)
        flight.closed_choices.add(index)

    # The end of a request.

    def _cancel(self, flight: Flight, index: int | None = None) -> None:
        if index is None:
            self.end(flight, dispatch_errors.cancelled_error())
        elif not flight.is_ended and index in flight.open_choices:
            self._close(flight, index)
            if flight.link is not None:
                flight.link.abort(flight.work_id, index)
            self._end_if_whole(flight)

    def end(self, flight: Flight, error: OctavoError | None) -> None:
        """End a request, once, wherever it is. The one place where that happens."""
        if flight.is_ended:
            return
        flight.is_ended = True
        self._flights.remove(flight)
        self._departures.remove(flight, self._clock())
        work_id = flight.work_id
        if (link := self._departures.leave(flight)) is not None:
            link.abort(work_id)
        flight.permit.release()
        flight.sink.ended(error)
        if flight.spans is not None:
            flight.spans.ended(error)
        if self._is_draining and not self._flights:
            self._last_ended.set()

    def check_integrity(self) -> None:
        """Assert that every book agrees with every other; for tests."""
        self._admission.check_integrity()
        self._flights.check_integrity()
        self._departures.check_integrity()
        backlog = self.backlog()
        assert backlog.num_queued_requests == self._departures.num_waiting
        assert backlog.num_queued_tokens == self._departures.num_waiting_tokens
        assert backlog.num_running_requests == len(self._flights.aboard)
