"""One answer as its reader sees it: an async iterable of deltas, and afterwards its accounts.

Leaving the ``async for`` early, cancelling the task that reads, `aclose`, or dropping the last reference cancels the
request. Does not know Sessions: reading and cancelling go through the `Reader` that the client gives.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from octavo.client.answer import Choice, Completion, Decision, Delta, Finish, TokenLogprobs, Usage
from octavo.client.exchange import Exchange


class GenerationOwner(Protocol):
    """Where a reader's doings go."""

    def read(self, exchange: Exchange) -> None:
        """A delta was taken: there may be something to grant."""

    def cancel(self, exchange: Exchange) -> None:
        """Nobody will read on. Idempotent."""


class Generation:
    """One request's answer, begun when `Client.generate` returned it. It has one reader, and can be read once.

        generation = client.generate("Once upon", max_tokens=50)
        async for delta in generation:
            print(delta.text, end="")
        print(generation.usage)

    Raises a `CallError` out of the ``async for`` if the request does not end well, after what came before it.
    """

    def __init__(self, exchange: Exchange, owner: GenerationOwner, changed: asyncio.Event, *, trace_id: str) -> None:
        self._exchange = exchange
        self._owner = owner
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._trace_id = trace_id
        self._is_reading = False

    @property
    def request_id(self) -> str:
        return self._exchange.request_id

    @property
    def trace_id(self) -> str:
        """The W3C trace id that the request carries; "" if it carries none."""
        return self._trace_id

    @property
    def usage(self) -> Usage | None:
        """Set when the request has ended, where the router could tell."""
        return self._exchange.usage

    @property
    def decision(self) -> Decision | None:
        """Set when the request has ended, where the router could tell."""
        return self._exchange.decision

    @property
    def is_ended(self) -> bool:
        """Whether the request is over; deltas may still be there to read."""
        return self._exchange.is_ended

    def cancel(self) -> None:
        """Cancel the request, from the event loop's thread. Idempotent; without effect on one that has ended."""
        self._owner.cancel(self._exchange)

    async def aclose(self) -> None:
        """Cancel the request if it still runs, and forget what was not read."""
        self.cancel()
        self._exchange.discard()

    async def complete(self) -> Completion:
        """Read to the end and return the whole answer. Raises CallError."""
        pieces: list[list[Delta]] = [[] for _ in self._exchange.finishes]
        async for delta in self:
            pieces[delta.index].append(delta)
        return Completion(
            choices=tuple(map(_choice, pieces, self._exchange.finishes)),
            usage=self.usage,
            decision=self.decision,
            request_id=self.request_id,
            trace_id=self.trace_id,
        )

    def __aiter__(self) -> _Reading:
        return _Reading(self)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        _from_any_thread(self._loop, self._exchange, self._owner.cancel)

    async def _next(self) -> Delta:
        if self._is_reading:
            raise RuntimeError("an answer has one reader; two are waiting for its next delta")
        self._is_reading = True
        try:
            while True:
                delta = self._exchange.take()
                if delta is not None:
                    self._owner.read(self._exchange)
                    return delta
                if self._exchange.is_ended:
                    if self._exchange.error is not None:
                        raise self._exchange.error
                    raise StopAsyncIteration
                self._changed.clear()
                await self._changed.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            self._is_reading = False


class _Reading:
    """One ``async for`` over an answer. Python drops it when the loop is left, and that cancels the request."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> Delta:
        return await self._generation._next()

    def __del__(self) -> None:
        generation = self._generation
        _from_any_thread(generation._loop, generation._exchange, generation._owner.cancel)


def _from_any_thread(loop: asyncio.AbstractEventLoop, exchange: Exchange, cancel: Callable[[Exchange], None]) -> None:
    """Cancel from a finaliser, which may run in any thread and after the loop."""
    if not exchange.is_ended and not loop.is_closed():
        loop.call_soon_threadsafe(cancel, exchange)


def _choice(deltas: list[Delta], finish: Finish | None) -> Choice:
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for delta in deltas:
        token_ids += delta.token_ids
        logprobs += delta.logprobs
    return Choice("".join(delta.text for delta in deltas), tuple(token_ids), finish, tuple(logprobs))
