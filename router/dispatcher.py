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
from typing import Final

from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from router.admission import Admission
from router.batcher import Batcher, DispatchBatch, Queued
from router.config import RouterConfig
from router.dispatch_spans import DispatchSpans
from router.finish_errors import error_of
from router.fleet import Fleet
from router.flight import Flight
from router.hello import RouterIdentity
from router.link import LinkTimes, ReplicaLink
from router.placement import Placement, PromptHashes
from router.removable_heap import RemovableHeap
from router.types import Backlog, Cancel, Decision, ReplicaAddress, ReplicaView, Request, Sink
from router.wire import from_finish, from_logprobs, to_work
from workers.errors import (
    CancelledRequestError,
    CapabilityError,
    DeadlineError,
    OctavoError,
    UnavailableError,
    Violation,
)
from workers.types import (
    CAPABILITY_LOGIT_BIAS,
    CAPABILITY_LOGPROBS,
    CAPABILITY_RECEIVED_CHOICES,
    Finish,
    FinishReason,
)

MAX_LOSSES: Final = 3
"""A request that was on so many replicas when they were lost is not tried again: it may be what kills them."""


_FIELDS: Final = {
    CAPABILITY_LOGPROBS: "logprobs",
    CAPABILITY_LOGIT_BIAS: "sampling.logit_bias",
    CAPABILITY_RECEIVED_CHOICES: "received_token_ids",
}
"""Of a request, by the capability that they need; best_of needs that of logprobs."""


class Dispatcher:
    """Implements `router.types.Backend` and `router.link.LinkListener`, on the loop that `start` was called on."""

    def __init__(
        self,
        config: RouterConfig,
        identity: RouterIdentity,
        *,
        rng: random.Random | None = None,
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
        self._batcher = Batcher(
            max_batch_tokens=config.max_batch_tokens,
            max_batch_requests=config.max_batch_requests,
            max_batch_wait_s=config.max_batch_wait_s,
        )
        self._placement = Placement(self._rng)
        self._fleet = Fleet(lambda address: ReplicaLink(address, identity, self, rng=self._rng, times=link_times))
        self._numbers = itertools.count(1)
        self._flights: dict[int, Flight] = {}
        """Every request that has not ended, by its number."""
        self._works: dict[int, Flight] = {}
        """Those that a replica has, by the work id of their present attempt. A delta of any other work is late."""
        self._deadlines = RemovableHeap()
        """Of the requests in `_works`; the batcher keeps those of the others."""
        self._without_replica_since: float | None = clock()
        """None while a replica is ready."""
        self._is_draining = False
        self._last_ended = asyncio.Event()
        """Set when no request is left after `drain` began."""
        self._is_stopped = False
        self._is_pump_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._loop: asyncio.AbstractEventLoop | None = None

    # Life.

    def start(self) -> None:
        """Serve on the running loop."""
        assert self._loop is None
        self._loop = asyncio.get_running_loop()
        self._without_replica_since = self._clock()
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
        for flight in list(self._flights.values()):
            self._end(flight, UnavailableError("this router is stopping", reason=Reason.DRAINING))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        # The aborts of what was just ended need not arrive: a replica aborts the works of a router that leaves.
        await self._fleet.close()

    # The Backend.

    def submit(self, request: Request, sink: Sink) -> Cancel:
        if self._is_draining:
            raise UnavailableError("this router is draining: it takes no new requests", reason=Reason.DRAINING)
        if missing := self._fleet.lacks(request.needed_capabilities):
            raise _capability_error(missing)
        now = self._clock()
        permit = self._admission.admit(request.num_known_tokens, now, num_choices=request.n)
        flight = Flight(next(self._numbers), request, sink, permit)
        flight.spans = DispatchSpans.begin(request, self._identity.router_id, now)
        self._flights[flight.key] = flight
        self._queue(flight, now)
        return partial(self._cancel, flight)

    def replicas(self) -> Sequence[ReplicaView]:
        return self._fleet.views()

    def backlog(self) -> Backlog:
        return self._admission.backlog()

    # The queue.

    def _queue(self, flight: Flight, now: float) -> None:
        self._batcher.add(Queued(key=flight.key, request=flight.request, attempt=flight.attempt, since=now))
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
        for queued in self._batcher.expire(now):
            self._end_queued(queued, _deadline_error(queued.request, now))
        ready = self._fleet.ready()
        if ready:
            self._without_replica_since = None
            left: list[Queued] = []
            while (batch := self._batcher.next_batch(now, _credit(ready))) is not None:
                left += self._dispatch(batch, ready, now)
            for queued in left:
                if queued.key in self._flights:
                    self._batcher.add(replace(queued, since=now))
        else:
            self._give_up(now)
        self._arm(now, _credit(ready))

    def _give_up(self, now: float) -> None:
        """End the requests that have waited too long while no replica was there."""
        if self._without_replica_since is None:
            self._without_replica_since = now
        limit = now - self._config.no_replica_wait_s
        if self._without_replica_since > limit:
            return
        for queued in self._batcher.waiting_since(limit):
            message = f"no replica was ready within {self._config.no_replica_wait_s:g} s"
            self._end_queued(queued, UnavailableError(message, reason=Reason.NO_REPLICA))

    def _dispatch(self, batch: DispatchBatch, ready: Sequence[ReplicaLink], now: float) -> list[Queued]:
        """Send a batch; return what has to wait on, because the replicas that can do it have no credit or are not
        ready. (Where all replicas can do the same there is none: somebody has credit for each request of a batch.)"""
        left: list[Queued] = []
        for queued in itertools.chain.from_iterable(batch.groups):
            flight = self._flights.get(queued.key)
            if flight is None:  # cancelled by what its neighbour's sink did
                continue
            if flight.hashes is None:
                flight.hashes = PromptHashes(self._identity.keys.prefix_hash, flight.request)
            needed = flight.request.needed_capabilities
            states = [link.state for link in ready if not needed or needed <= link.capabilities]
            decision = self._placement.place(flight.request, flight.hashes, states, attempt=flight.attempt)
            if decision is not None:
                self._send(flight, decision, batch.batch_id, now)
            elif missing := self._fleet.lacks(needed):
                self._end(flight, _capability_error(missing))
            else:
                left.append(queued)
        return left

    def _send(self, flight: Flight, decision: Decision, batch_id: int, now: float) -> None:
        request = flight.request
        link = self._fleet.link(decision.replica)
        traceparent, tracestate = request.traceparent, request.tracestate
        if flight.spans is not None:
            traceparent, tracestate = flight.spans.dispatched(decision, batch_id)
        flight.work_id, flight.link = next(self._numbers), link
        self._works[flight.work_id] = flight
        self._fleet.board(link, flight)
        self._deadlines.push(flight.work_id, request.deadline)
        flight.permit.dispatched(now)
        work = to_work(
            request,
            work_id=flight.work_id,
            attempt=flight.attempt,
            now=now,
            traceparent=traceparent,
            tracestate=tracestate,
        )
        link.send(batch_id, work, request.num_known_tokens)
        for index in flight.cancelled_choices:
            link.abort(flight.work_id, index)
        flight.sink.dispatched(decision, now - request.accepted_at)

    # Time.

    def _arm(self, now: float, credit_tokens: int) -> None:
        """Set the one timer to the next thing that happens by itself."""
        events = [self._batcher.next_event(credit_tokens)]
        if (first := self._deadlines.first()) is not None:
            events.append(first[0])
        if self._without_replica_since is not None and self._batcher.oldest_since is not None:
            begin = max(self._batcher.oldest_since, self._without_replica_since)
            events.append(begin + self._config.no_replica_wait_s)
        at = min((event for event in events if event is not None), default=math.inf)
        # One that comes too early does nothing but arm again, which is cheaper than moving it at each request's end.
        if at >= self._timer_at or at == math.inf or self._is_stopped:
            return
        if self._timer is not None:
            self._timer.cancel()
        assert self._loop is not None
        self._timer_at = at
        self._timer = self._loop.call_later(max(at - now, 0.0), self._on_timer)

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = self._clock()
        while (first := self._deadlines.first()) is not None and first[0] <= now:
            flight = self._works[first[1]]
            self._end(flight, _deadline_error(flight.request, now))
        self._pump()

    # What replicas say: the LinkListener.

    def link_changed(self, link: ReplicaLink) -> None:
        if self._batcher.num_requests or not link.can_send:
            self._pump_soon()

    def link_delivered(self, link: ReplicaLink, deltas: Sequence[pb.WorkDelta]) -> None:
        for delta in deltas:
            flight = self._works.get(delta.work_id)
            if flight is None or flight.link is not link:
                continue  # of an attempt that is over
            if delta.HasField("cached_tokens"):
                flight.sink.cached(delta.cached_tokens)
            if delta.index not in flight.open_choices:
                continue  # of a choice that nobody wants any more
            if delta.token_ids:
                flight.is_untouched = False
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
            self._leave(flight)
            self._end(flight, None)

    def _lose(self, flight: Flight, message: str, reason: str) -> None:
        """Its replica will not finish it. Nothing has been said yet: it waits for another one. Else it ends."""
        if flight.is_ended:  # by what the sink of another one did
            return
        self._leave(flight)
        if not flight.is_untouched or flight.num_losses >= MAX_LOSSES:
            self._end(flight, UnavailableError(message, reason=Reason.REPLICA_LOST))
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
            self._end(flight, CancelledRequestError("the request was cancelled"))
        elif not flight.is_ended and index in flight.open_choices:
            flight.open_choices.remove(index)
            flight.cancelled_choices.add(index)
            if flight.link is not None:
                flight.link.abort(flight.work_id, index)
            self._end_if_whole(flight)

    def _leave(self, flight: Flight) -> ReplicaLink | None:
        """Take the request off its replica's books, if it is on any; return that link."""
        link, flight.link = flight.link, None
        if link is None:
            return None
        del self._works[flight.work_id]
        self._deadlines.discard(flight.work_id)
        self._fleet.leave(link, flight)
        return link

    def _end_queued(self, queued: Queued, error: OctavoError) -> None:
        """End a request that the batcher has handed back, unless the sink of another one did so meanwhile."""
        flight = self._flights.get(queued.key)
        if flight is not None:
            self._end(flight, error)

    def _end(self, flight: Flight, error: OctavoError | None) -> None:
        """End a request, once, wherever it is. The one place where that happens."""
        if flight.is_ended:
            return
        flight.is_ended = True
        del self._flights[flight.key]
        self._batcher.remove(flight.key)
        work_id = flight.work_id
        if (link := self._leave(flight)) is not None:
            link.abort(work_id)
        flight.permit.release()
        if flight.spans is not None:
            flight.spans.ended(error)
        flight.sink.ended(error)
        if self._is_draining and not self._flights:
            self._last_ended.set()

    def check_integrity(self) -> None:
        """Assert that every book agrees with every other; for tests."""
        self._batcher.check_integrity()
        self._deadlines.check_integrity()
        self._fleet.check_integrity()
        assert not any(flight.is_ended for flight in self._flights.values())
        assert len(self._flights) == self._batcher.num_requests + len(self._works)
        assert len(self._works) == len(self._deadlines) == self._fleet.num_aboard()
        backlog = self.backlog()
        assert backlog.num_queued_requests == self._batcher.num_requests
        assert backlog.num_queued_tokens == self._batcher.num_tokens
        assert backlog.num_running_requests == len(self._works)


def _credit(ready: Sequence[ReplicaLink]) -> int:
    return sum(max(link.state.credit_tokens, 0) for link in ready)


def _capability_error(missing: frozenset[str]) -> CapabilityError:
    violations = [
        Violation(_FIELDS.get(name, name), f"no replica of this model has an engine with the capability {name!r}")
        for name in sorted(missing)
    ]
    return CapabilityError("; ".join(f"{field}: {rule}" for field, rule in violations), violations=violations)


def _deadline_error(request: Request, now: float) -> DeadlineError:
    waited = now - request.accepted_at
    return DeadlineError(f"the deadline passed {waited:.3f} s after the request was accepted")
