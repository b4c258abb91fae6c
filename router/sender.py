"""Puts one request on the link to the replica that placement chooses. Owns nothing; what it did is in the books."""

from __future__ import annotations

from router import dispatch_errors
from router.decision_log import DecisionLog
from router.fleet import Fleet
from router.flight import Flight
from router.flights import Flights
from router.placement import Placement, PromptHashes
from router.types import Decision
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

    def send(self, flight: Flight, batch_id: int, now: float) -> bool:
        """Place and send a request; return False, and no effect, if it has to wait on: the replicas that can do it have
        no credit or are not ready. Raises CapabilityError if no replica can do it."""
        request, hashes = flight.request, flight.hashes
        assert hashes is not None, "who waits to be sent has them"
        decision = self._placement.place(request, hashes, self._fleet.roster, attempt=flight.attempt)
        if decision is not None:
            if self._log is not None:
                self._log.add(request, decision)
            self._send(flight, hashes, decision, batch_id, now)
        elif missing := self._fleet.lacks(request.needed_capabilities):
            raise dispatch_errors.capability_error(missing)
        return decision is not None

    def _send(self, flight: Flight, hashes: PromptHashes, decision: Decision, batch_id: int, now: float) -> None:
        request = flight.request
        link = self._fleet.link(decision.replica)
        traceparent, tracestate = request.traceparent, request.tracestate
        if flight.spans is not None:
            traceparent, tracestate = flight.spans.dispatched(decision, batch_id)
        self._flights.board(flight, link)
        flight.permit.dispatched(now)
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
        flight.sink.dispatched(decision, now - request.accepted_at)
