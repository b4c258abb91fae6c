"""What the engine has to say and nobody has fetched yet: deltas and KV events, and that there are any."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from workers.types import KvEvent, TokenDelta


class Outbox:
    """Filled on `loop`'s thread, or on any while it does not run; emptied from any thread. `notify` is called once for
    all that comes in one turn of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, notify: Callable[[], None]) -> None:
        self._loop = loop
        self._notify = notify
        self._lock = threading.Lock()
        """Guards `_outputs` and `_events`."""
        self._outputs: list[TokenDelta] = []
        self._events: list[KvEvent] = []
        self._is_telling = False

    def emit(self, delta: TokenDelta) -> None:
        with self._lock:
            self._outputs.append(delta)
        self.tell()

    def add_events(self, events: list[KvEvent], *, anew: bool = False) -> None:
        """`anew`: they tell of all from the beginning, and what was not fetched does not count any more."""
        with self._lock:
            self._events = events if anew else [*self._events, *events]
        self.tell()

    def take_outputs(self) -> list[TokenDelta]:
        with self._lock:
            outputs, self._outputs = self._outputs, []
        return outputs

    def take_events(self) -> list[KvEvent]:
        with self._lock:
            events, self._events = self._events, []
        return events

    def tell(self) -> None:
        """There is news, if only of the load."""
        try:
            is_on_loop = asyncio.get_running_loop() is self._loop
        except RuntimeError:
            is_on_loop = False
        if not is_on_loop:
            self._notify()
        elif not self._is_telling:
            self._is_telling = True
            self._loop.call_soon(self._tell_now)

    def _tell_now(self) -> None:
        self._is_telling = False
        self._notify()
