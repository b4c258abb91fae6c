"""Every request that has not ended, and what becomes of it when the Session that carries it breaks:

    answer not begun     same request id again, on any address, while the deadline and `retry_timeout_s` allow
    answer begun         attach again on the same address, from the token after the last one received; if that does not
                         connect, or the router has ended the request as UNAVAILABLE, go on after that token elsewhere
                         (but for `best_of`, of which nobody else would pick the same choices)
    neither possible     UnavailableError

Owns each request's timers and span, and ends it in exactly one place (`_end`). All on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import grpc.aio

from octavo.client.errors import (
    CallError,
    DeadlineExceededError,
    InvalidArgumentError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
    from_terminal,
)
from octavo.client.exchange import Exchange
from octavo.client.link import Link
from octavo.client.options import ClientOptions
from octavo.client.tracing import RequestSpan
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb

_FINAL_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.PERMISSION_DENIED,
    }
)
"""A router that ends a whole Session with one of these would do so again."""

_DEADLINE_SLACK_S = 0.1
"""How long the router's own DEADLINE_EXCEEDED, which has more to tell, is waited for."""

_LARGE_START_BYTES = 1024 * 1024
"""A Start of this size travels alone, so that it is known which one a router found too large."""

_START_BYTES = 4096
"""At most what a Start has besides its request."""


@dataclass(slots=True, eq=False)
class _Flight:
    """A request that has not ended: who carries it, its timers, and since when it is in trouble."""

    exchange: Exchange
    span: RequestSpan
    link: Link
    deadline_timer: asyncio.TimerHandle | None = None
    retry_timer: asyncio.TimerHandle | None = None
    """Ends a request that found no router in time, or places one that was turned away."""
    trouble_since: float | None = None
    num_retries: int = 0
    num_tokens: int = 0
    """That had come when the trouble began."""

    def stop_timers(self) -> None:
        for timer in (self.deadline_timer, self.retry_timer):
            if timer is not None:
                timer.cancel()


class Flights:
    """`links` are the addresses, at least one. What readers do and what Links report arrives here."""

    def __init__(
        self, targets: tuple[str, ...], options: ClientOptions, *, dial: Callable[[str], grpc.aio.Channel]
    ) -> None:
        self.links = [
            Link(target, self, dial=dial, backoff=options.backoff, metadata=options.metadata) for target in targets
        ]
        self._options = options
        self._loop = asyncio.get_running_loop()
        self._turn = itertools.count()
        self._flights: dict[str, _Flight] = {}

    def begin(self, exchange: Exchange, *, traceparent: str, tracestate: str) -> str:
        """Send `exchange` on its way and return its trace id. Raises InvalidArgumentError for an id in use,
        ResourceExhaustedError if it is too large for one message."""
        self._check(exchange)
        span = RequestSpan(exchange.request_id, exchange.request, traceparent=traceparent, tracestate=tracestate)
        exchange.traceparent, exchange.tracestate = span.traceparent, span.tracestate
        flight = _Flight(exchange, span, self._choose_link())
        self._flights[exchange.request_id] = flight
        if exchange.deadline is not None:
            flight.deadline_timer = self._loop.call_at(exchange.deadline + _DEADLINE_SLACK_S, self._expire, flight)
        flight.link.take(exchange)
        return span.trace_id

    async def close(self) -> None:
        """Cancel every request, and close every link within about `close_timeout_s`."""
        for flight in list(self._flights.values()):
            self.cancel(flight.exchange)
        await asyncio.gather(*(link.close(self._options.close_timeout_s) for link in self.links))

    # What readers do.

    def read(self, exchange: Exchange) -> None:
        tokens = exchange.take_grant()
        if tokens:
            self._flights[exchange.request_id].link.grant(exchange, tokens)

    def cancel(self, exchange: Exchange) -> None:
        if not exchange.is_ended:
            self._stop(exchange, RequestCancelledError("the client cancelled the request", reason=Reason.CANCELLED))

    # What links report.

    def exchange_started(self, exchange: Exchange) -> None:
        flight = self._flights.get(exchange.request_id)
        if flight is not None and flight.exchange is exchange and flight.retry_timer is not None:
            flight.retry_timer.cancel()
            flight.retry_timer = None

    def exchange_terminated(self, exchange: Exchange, terminal: pb.Terminal) -> None:
        exchange.account(terminal)
        if terminal.code == 0:
            self._end(exchange, None)
            return
        error = from_terminal(terminal)
        if error.reason == Reason.REQUEST_NOT_FOUND:  # the answer to an attach, after the router forgot the request
            lost = UnavailableError("the router no longer has this request's answer", reason=Reason.SESSION_LOST)
            self._end(exchange, None if exchange.is_whole else lost)
        elif isinstance(error, UnavailableError) and exchange.can_go_on:
            self._retry_later(self._flights[exchange.request_id], error)
        else:
            self._end(exchange, error)

    def exchange_broken(self, exchange: Exchange, error: CallError) -> None:
        self._stop(exchange, error)

    def exchange_lost(self, exchange: Exchange, error: CallError, *, was_proven: bool) -> None:
        is_too_large = (
            error.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            and exchange.num_bytes > _LARGE_START_BYTES
            and not exchange.has_tokens
        )
        if error.code in _FINAL_CODES or is_too_large:
            self._end(exchange, error)
            return
        flight = self._flights[exchange.request_id]
        flight.span.event("session lost", error)
        now = self._loop.time()
        if was_proven or flight.trouble_since is None:
            flight.trouble_since = now
        if flight.retry_timer is not None:
            flight.retry_timer.cancel()
        give_up_at = flight.trouble_since + self._options.retry_timeout_s
        if now >= give_up_at:
            self._give_up(flight, error)
            return
        flight.retry_timer = self._loop.call_at(give_up_at, self._give_up, flight, error)
        self._place(flight, is_reachable=was_proven)

    def exchange_withdrawn(self, exchange: Exchange) -> None:
        self._place(self._flights[exchange.request_id])

    # How it goes on.

    def _choose_link(self) -> Link:
        """The fit address with the fewest requests; among equals in turn."""
        turn = next(self._turn)
        order = self.links[turn % len(self.links) :] + self.links[: turn % len(self.links)]
        return min(order, key=lambda link: (not link.is_fit, link.num_exchanges))

    def _place(self, flight: _Flight, *, is_reachable: bool = False) -> None:
        """`is_reachable`: its address was, so that the router there may have kept the answer."""
        if not (is_reachable and flight.exchange.has_tokens):
            flight.link = self._choose_link()
        flight.link.take(flight.exchange)

    def _retry_later(self, flight: _Flight, error: CallError) -> None:
        """Try again, with the same id, a request that a router turned away."""
        flight.exchange.turned_away()
        flight.span.event("turned away", error)
        now = self._loop.time()
        if flight.trouble_since is None or flight.exchange.num_tokens > flight.num_tokens:
            flight.trouble_since, flight.num_retries = now, 0
            flight.num_tokens = flight.exchange.num_tokens
        flight.num_retries += 1
        at = now + max(self._options.backoff.delay(flight.num_retries), error.retry_delay or 0.0)
        give_up_at = flight.trouble_since + self._options.retry_timeout_s
        if at >= min(give_up_at, flight.exchange.deadline or give_up_at):
            self._end(flight.exchange, error)
            return
        flight.retry_timer = self._loop.call_at(at, self._place, flight)

    def _give_up(self, flight: _Flight, error: CallError) -> None:
        flight.retry_timer = None
        if not isinstance(error, UnavailableError | ResourceExhaustedError):
            error = UnavailableError(f"the Session was lost: {error}", reason=Reason.SESSION_LOST)
        self._stop(flight.exchange, error)

    def _expire(self, flight: _Flight) -> None:
        error = DeadlineExceededError("the request's timeout passed", reason=Reason.DEADLINE_PASSED)
        self._stop(flight.exchange, error)

    def _stop(self, exchange: Exchange, error: CallError) -> None:
        """End a request that a router may still be working on."""
        self._flights[exchange.request_id].link.cancel(exchange)
        self._end(exchange, error)

    def _end(self, exchange: Exchange, error: CallError | None) -> None:
        """The one place where a request ends."""
        flight = self._flights.pop(exchange.request_id)
        flight.stop_timers()
        exchange.end(error)
        flight.span.end(exchange)

    def _check(self, exchange: Exchange) -> None:
        if exchange.request_id in self._flights:
            message = f"request_id must be unique among live requests, {exchange.request_id!r} is running"
            raise InvalidArgumentError(message, reason=Reason.REQUEST_ID_IN_USE)
        limit = self._options.max_message_bytes
        if exchange.num_bytes > limit - _START_BYTES:
            message = f"a request must be smaller than max_message_bytes = {limit} bytes, has {exchange.num_bytes}"
            raise ResourceExhaustedError(message, reason=Reason.MESSAGE_TOO_LARGE)
