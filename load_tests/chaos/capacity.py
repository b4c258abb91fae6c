"""Whether all routers answer and know all replicas: asked again and again, at the address that routers share.

A new connection leads to one router or another, so connections are opened until as many routers as there should be were
met; one that leads to a router twice is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Set
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from octavo.client import CallError, Client, ClientOptions
from octavo.v1.status_service_pb2 import GetStatusResponse, ReplicaStatus

POLL_S = 0.2
ANSWER_S = 1.0
"""For a router to answer; one that is frozen does not."""
RESTORE_S = 120.0
"""Capacity that is not back after so long is taken not to come back."""
MAX_PROBES = 6


@dataclass(frozen=True, slots=True)
class View:
    """What the routers that answered said. `asked_at`: on the monotonic clock."""

    asked_at: float
    routers: dict[str, GetStatusResponse] = field(default_factory=dict)

    @property
    def replicas(self) -> list[ReplicaStatus]:
        """Those that some router may send work to, in the order of their ids."""
        found = {each.id: each for status in self.routers.values() for each in status.replicas if each.state == "ready"}
        return [found[name] for name in sorted(found)]

    def is_whole(self, *, routers: int, replicas: int, gone: Set[int]) -> bool:
        """Whether as many routers answer, and each is ready to send to as many replicas. `gone`: pids that are dead,
        whoever still believes in them."""
        if len(self.routers) != routers:
            return False
        for status in self.routers.values():
            ready = [each.pid for each in status.replicas if each.state == "ready"]
            if len(ready) != replicas or status.router.pid in gone or not gone.isdisjoint(ready):
                return False
        return True


class Capacity:
    """Runs while entered; `view` is the last one."""

    def __init__(self, address: str, *, routers: int, replicas: int) -> None:
        self.routers, self.replicas = routers, replicas
        self.gone: set[int] = set()
        """Of processes that were killed."""
        self.view = View(0.0)
        self._address = address
        self._options = ClientOptions(call_timeout_s=ANSWER_S, connect_timeout_s=ANSWER_S)
        self._probes: list[Client] = []
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Capacity:
        self._task = asyncio.create_task(self._run(), name="capacity")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def restored(self, holds: Callable[[], bool] = lambda: True, *, timeout_s: float = RESTORE_S) -> bool:
        """Wait until all is there that should be, as asked from now on, and `holds`; return whether it came to that."""
        began = time.monotonic()
        while not (self._is_whole(since=began) and holds()):
            if time.monotonic() > began + timeout_s:
                return False
            await asyncio.sleep(POLL_S / 4)
        return True

    def _is_whole(self, *, since: float) -> bool:
        return self.view.asked_at >= since and self.view.is_whole(
            routers=self.routers, replicas=self.replicas, gone=frozenset(self.gone)
        )

    async def _run(self) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close)
            while True:
                await self._look()
                await asyncio.sleep(POLL_S)

    async def _look(self) -> None:
        if len(self.view.routers) < self.routers and len(self._probes) < MAX_PROBES:
            self._probes.append(await Client(self._address, options=self._options).__aenter__())
        asked_at, probes = time.monotonic(), list(self._probes)
        answers = await asyncio.gather(*map(_status, probes))
        routers: dict[str, GetStatusResponse] = {}
        for probe, status in zip(probes, answers, strict=True):
            if status is None or status.router.id in routers:
                self._probes.remove(probe)
                await probe.close()
            else:
                routers[status.router.id] = status
        self.view = View(asked_at, routers)

    async def _close(self) -> None:
        await asyncio.gather(*(probe.close() for probe in self._probes))


async def _status(probe: Client) -> GetStatusResponse | None:
    try:
        return await probe.status()
    except CallError:
        return None
