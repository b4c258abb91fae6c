"""One router address: the Session that takes new requests, older ones that finish, and who waits for the next one.

Opens a Session when there is something to carry, no sooner than its backoff allows, and says how fit the address is so
that the client can prefer another. What becomes of a request whose Session broke is for the `LinkOwner` to say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import grpc
import grpc.aio

from octavo.client.backoff import Backoff
from octavo.client.errors import CallError, ConnectionFailedError
from octavo.client.exchange import Exchange
from octavo.client.session import Session
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb

_AVOID_AFTER_FAILURE_S = 5.0
"""How long other addresses are preferred to one that failed."""

_ABANDON_S = 30.0
"""How long a cancel that may have been lost with its Session is repeated; after that, no router keeps the request."""


class LinkOwner(Protocol):
    """What becomes of exchanges; none of these raises."""

    def exchange_started(self, exchange: Exchange) -> None: ...

    def exchange_terminated(self, exchange: Exchange, terminal: pb.Terminal) -> None: ...

    def exchange_broken(self, exchange: Exchange, error: CallError) -> None:
        """The router broke the contract; the exchange is still carried."""

    def exchange_lost(self, exchange: Exchange, error: CallError, *, was_proven: bool) -> None:
        """The Session that carried it broke, after having worked or not."""

    def exchange_withdrawn(self, exchange: Exchange) -> None:
        """It never left, and the router takes no more: place it anew."""


class Link:
    """`dial` makes a channel with a connection of its own; `metadata` goes with each Session. Methods are for the event
    loop's thread only."""

    def __init__(
        self,
        target: str,
        owner: LinkOwner,
        *,
        dial: Callable[[str], grpc.aio.Channel],
        backoff: Backoff,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self.target = target
        self._owner = owner
        self._dial = dial
        self._backoff = backoff
        self._metadata = metadata
        self._loop = asyncio.get_running_loop()
        self._session: Session | None = None
        self._sessions: set[Session] = set()
        self._waiting: dict[str, Exchange] = {}
        self._abandoned: dict[str, Exchange] = {}
        self._num_failures = 0
        self._not_before = 0.0
        self._avoid_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def num_exchanges(self) -> int:
        return len(self._waiting) + sum(len(session.exchanges) for session in self._sessions)

    @property
    def is_fit(self) -> bool:
        """Whether nothing spoke against this address lately."""
        return self._loop.time() >= self._avoid_until

    def take(self, exchange: Exchange) -> None:
        """Carry `exchange`, now or on the next Session."""
        self._waiting[exchange.request_id] = exchange
        self._proceed()

    def cancel(self, exchange: Exchange) -> None:
        """Carry `exchange` no longer; a router that may know of it is told, at the latest by the next Session."""
        exchange.cancelled_at = self._loop.time()
        if self._waiting.pop(exchange.request_id, None):
            if exchange.is_started:
                self._abandoned[exchange.request_id] = exchange
            return
        for session in self._sessions:
            session.cancel(exchange)

    def grant(self, exchange: Exchange, tokens: int) -> None:
        for session in self._sessions:
            session.grant(exchange, tokens)

    async def close(self, timeout_s: float) -> None:
        """Close every Session within about `timeout_s`."""
        self._is_closed = True
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(session.close(timeout_s) for session in tuple(self._sessions)))

    def _proceed(self) -> None:
        """Hand everything that waits to a Session, or see to it that one comes."""
        if self._is_closed or not (self._waiting or self._abandoned):
            return
        if self._session is None:
            if self._loop.time() < self._not_before:
                if self._timer is None:
                    self._timer = self._loop.call_at(self._not_before, self._retry)
                return
            self._session = Session(self._dial(self.target), self, metadata=self._metadata)
            self._sessions.add(self._session)
        waiting, self._waiting = self._waiting, {}
        abandoned, self._abandoned = self._abandoned, {}
        for exchange in abandoned.values():
            self._session.abandon(exchange)
        for exchange in waiting.values():
            self._session.start(exchange)

    def _retry(self) -> None:
        self._timer = None
        self._proceed()

    def _fail(self) -> None:
        self._num_failures += 1
        now = self._loop.time()
        self._not_before = now + self._backoff.delay(self._num_failures)
        self._avoid_until = max(self._avoid_until, now + _AVOID_AFTER_FAILURE_S)

    # What a Session reports.

    def session_started(self, exchange: Exchange) -> None:
        self._owner.exchange_started(exchange)

    def session_terminated(self, exchange: Exchange, terminal: pb.Terminal) -> None:
        self._owner.exchange_terminated(exchange, terminal)

    def session_broke_contract(self, exchange: Exchange, error: CallError) -> None:
        self._owner.exchange_broken(exchange, error)

    def session_going_away(self, session: Session, go_away: pb.GoAway) -> None:
        grace_s = go_away.grace.seconds + go_away.grace.nanos / 1e9
        self._avoid_until = max(self._avoid_until, self._loop.time() + grace_s)
        if session is self._session:
            self._session = None
            if not session.is_proven:  # an address that says nothing else must not be dialled in a loop
                self._fail()
        for exchange in session.retire():
            self._owner.exchange_withdrawn(exchange)

    def session_ended(self, session: Session, error: CallError | None) -> None:
        self._sessions.discard(session)
        was_current = session is self._session
        if was_current:
            self._session = None
        if session.is_proven:
            self._num_failures = 0
        # Any other status is a router's, whose answer may come before the Session knows that it is connected.
        if error is not None and not session.is_connected and error.code is grpc.StatusCode.UNAVAILABLE:
            message = f"cannot reach {self.target}: {error.message}"
            error = ConnectionFailedError(message, reason=Reason.SESSION_LOST)
        if error is not None and was_current:
            self._fail()
        if error is not None:
            since = self._loop.time() - _ABANDON_S
            self._abandoned.update(
                (exchange.request_id, exchange)
                for exchange in session.cancelled.values()
                if exchange.is_started and exchange.cancelled_at is not None and exchange.cancelled_at > since
            )
        exchanges, session.exchanges = session.exchanges, {}
        for exchange in exchanges.values():
            assert error is not None, "a Session that was closed on purpose carries nothing"
            self._owner.exchange_lost(exchange, error, was_proven=session.is_proven)
        self._proceed()
