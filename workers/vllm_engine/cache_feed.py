"""Follows the events that vLLM's engine publishes of its cache, and hands them on in our names.

A ZeroMQ subscription on the event loop that vLLM's front end runs on. Messages are numbered; after a gap nothing that
was known is certain, and all of it is forgotten: a router then knows less than the cache has, never more.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Final

from workers.prefix import PrefixHasher
from workers.types import KvEvent
from workers.vllm_engine import versions
from workers.vllm_engine.block_map import BlockMap

SETTLE_S: Final = 0.2
"""How long a subscription takes to reach the publisher; what it misses before counts as a gap."""

_log = logging.getLogger(__name__)


class CacheFeed:
    """`on_events` is called on the event loop. `endpoint`: empty if nothing is published."""

    def __init__(self, endpoint: str, hasher: PrefixHasher, on_events: Callable[[list[KvEvent]], None]) -> None:
        self._endpoint = endpoint
        self._map = BlockMap(hasher)
        self._on_events = on_events
        self._task: asyncio.Task[None] | None = None
        self._context: Any = None
        self._next: int | None = 0

    async def start(self) -> None:
        if not self._endpoint:
            return
        import zmq
        import zmq.asyncio

        self._context = zmq.asyncio.Context()
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(self._endpoint)
        self._task = asyncio.get_running_loop().create_task(self._follow(socket), name="vllm-cache")
        await asyncio.sleep(SETTLE_S)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._context is not None:
            self._context.destroy(linger=0)

    def anew(self) -> list[KvEvent]:
        """Return events that tell of all that is known, from the beginning."""
        return self._map.anew()

    @property
    def num_findable(self) -> int:
        """Blocks that can be found."""
        return self._map.num_blocks

    @property
    def num_removed(self) -> int:
        """Blocks that made way for others."""
        return self._map.num_removed

    async def _follow(self, socket: Any) -> None:
        while True:
            _, number, payload = await socket.recv_multipart()
            try:
                events = self.take(int.from_bytes(number, "big"), payload)
            except Exception as error:
                _log.error("events of vLLM's cache could not be read", exc_info=error)
                events = self._map.cleared()
            if events:
                self._on_events(events)

    def take(self, number: int, payload: bytes) -> list[KvEvent]:
        """Return what one message tells, in our names. Raises ValueError for one that is none."""
        events = [] if number == self._next else self._map.cleared()
        self._next = number + 1
        for event in versions.events(payload):
            if isinstance(event, versions.Stored):
                events += self._map.stored(event.hashes, event.parent, event.tokens, event.salt)
            elif isinstance(event, versions.Removed):
                events += self._map.removed(event.hashes)
            else:
                events += self._map.cleared()
        return events
