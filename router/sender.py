"""Puts one request on the link to the replica that placement chooses. Owns nothing; what it did is in the books."""

from __future__ import annotations

from router import dispatch_errors
from router.decision_log import DecisionLog
from router.fleet import Fleet
from router.flight import Flight
from router.flights import Flights
from router.metrics import RouterMetrics
from router.placement import Placement, PromptHashes
from router.types import Attempt, BatchShape, Wait
from router.wire import to_work


class Sender:
    """Decisions go to `log`, too."""

    def __init__(
        self,
        fleet: Fleet,
        flights: Flights,
        placement: Placement,
        *,
        log: DecisionLog | None = None,
    ) -> None:
        self._fleet = fleet
        self._flights = flights
        self._placement = placement
        self._log = log
        self.metrics: RouterMetrics | None = None
        """Told of each decision."""

    def send(self, flight: Flight, batch: BatchShape, wait: Wait, now: float) -> bool:
        """Place and send a request; return False, and no effect, if it has to wait on: the replicas that can do it have
        no credit or are not ready. Raises CapabilityError if no replica can do it."""
        request, hashes = flight.request, flight.hashes
        assert hashes is not None, "who waits to be sent has them"
        decision = self._placement.place(request, hashes, self._fleet.roster, attempt=flight.attempt)
        if decision is not None:
            if self._log is not None:
                self._log.add(request, decision)
            attempt = Attempt(decision, now - request.accepted_at, sent_at=now, wait=wait, batch=batch)
            self._send(flight, hashes, attempt, now)
        elif missing := self._fleet.lacks(request.needed_capabilities):
            raise dispatch_errors.capability_error(missing)
        return decision is not None

    def _send(self, flight: Flight, hashes: PromptHashes, attempt: Attempt, now: float) -> None:
        request, decision, batch_id = flight.request, attempt.decision, attempt.batch.batch_id
        link = self._fleet.link(decision.replica)
        traceparent, tracestate = request.traceparent, request.tracestate
        if flight.spans is not None:
            traceparent, tracestate = flight.spans.dispatched(attempt)
        self._flights.board(flight, link)
        flight.permit.dispatched(now)
        if self.metrics is not None:
            self.metrics.placed(request.model, decision, after=flight.record)
        flight.record = attempt
        work = to_work(
            request,
            work_id=flight.work_id,
            attempt=flight.attempt,
            now=now,
            traceparent=traceparent,
            tracestate=tracestate,
        )
        link.send(batch_id, work, request.num_known_tokens - decision.matched_tokens)
        link.state.expect(flight.work_id, hashes.of(link.state.block_size))
        for index in flight.closed_choices:
            link.abort(flight.work_id, index)
        flight.sink.dispatched(attempt)
