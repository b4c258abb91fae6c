"""What one Session has to write, merged into as few messages as it takes: refusals, answers, a GoAway.

`take` says everything at once, up to a bound, the answer that has waited longest first. Knows neither the stream nor
who wrote last.
"""

from __future__ import annotations

import asyncio
from collections import deque
from functools import partial

from octavo.v1.inference_service_pb2 import Event, GoAway, SessionResponse, Terminal
from octavo.v1.types_pb2 import Delta

from router import status
from router.answer import MAX_MESSAGE_TOKENS, Answer
from router.entries import Entry
from workers.errors import OctavoError

EVENT_TOKENS = 32
"""What an event weighs beside its tokens."""
MAX_ECHO = 1_024
"""Characters of a refused start's request id that its Terminal repeats: what is longer is no id of a request."""
MAX_REFUSALS = 1_024
"""Refused starts that wait to be written; with more, nothing is read."""


class SessionOutbox:
    """`has_work` is set whenever something comes in; its reader clears it. `has_room`: few refusals wait."""

    def __init__(self) -> None:
        self.has_work = asyncio.Event()
        self.has_room = asyncio.Event()
        self.has_room.set()
        self._ready: dict[str, Entry] = {}
        """Requests that have something to write, the one that has waited longest first."""
        self._refusals: deque[Event] = deque()
        self._go_away: GoAway | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to take."""
        return not self._ready and not self._refusals and self._go_away is None

    @property
    def has_ready(self) -> bool:
        """Whether an answer has something to write."""
        return bool(self._ready)

    def add(self, entry: Entry) -> None:
        """Its answer has something to write."""
        self._ready[entry.request_id] = entry
        self.has_work.set()

    def discard(self, request_id: str) -> None:
        self._ready.pop(request_id, None)

    def clear(self) -> None:
        """Forget the answers."""
        self._ready.clear()

    def refuse(self, request_id: str, error: OctavoError) -> None:
        self._refusals.append(Event(request_id=request_id[:MAX_ECHO], terminal=status.to_terminal(error)))
        if len(self._refusals) >= MAX_REFUSALS:
            self.has_room.clear()
        self.has_work.set()

    def go_away(self, message: GoAway) -> None:
        self._go_away = message
        self.has_work.set()

    def take(self) -> tuple[SessionResponse, list[Entry]]:
        """Return everything available, up to a bound, and the requests whose Terminal is in it, of which nothing may be
        told any more."""
        message, ended = SessionResponse(), list[Entry]()
        budget = MAX_MESSAGE_TOKENS
        if self._go_away is not None:
            message.go_away.CopyFrom(self._go_away)
            self._go_away = None
        while self._refusals and budget > 0:
            message.events.append(self._refusals.popleft())
            budget -= EVENT_TOKENS
        if not self._refusals:
            self.has_room.set()
        ready, events = self._ready, message.events
        while ready and budget > 0:
            request_id = next(iter(ready))
            entry = ready.pop(request_id)
            answer = entry.answer
            budget -= EVENT_TOKENS + answer.take(budget, partial(_new_delta, message, request_id))
            if answer.is_complete:
                _fill_terminal(events.add(request_id=request_id).terminal, answer)
                ended.append(entry)
            elif answer.has_deltas:
                ready[request_id] = entry
        return message, ended


def _new_delta(message: SessionResponse, request_id: str) -> Delta:
    return message.events.add(request_id=request_id).delta


def _fill_terminal(terminal: Terminal, answer: Answer) -> None:
    if answer.error is None:
        terminal.SetInParent()
    else:
        terminal.CopyFrom(status.to_terminal(answer.error))
    answer.fill_usage(terminal.usage)
    if answer.accounts.decision is not None:
        terminal.replica = answer.accounts.replica
        answer.accounts.fill_decision(terminal.decision)
