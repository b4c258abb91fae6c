"""Samples what a router says of its cluster, many times a second, for as long as a rig changes the load."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from octavo.client import CallError, Client
from octavo.v1.status_service_pb2 import GetStatusResponse

from load_tests.process_tree import Process, started_s_ago, tree
from load_tests.rigs.elastic_timeline import Sample, Timeline
from load_tests.rigs.fake_nodes import FakeNodes

POLL_S = 0.05


class Watch:
    """Samples from when it is entered until it is left; `nodes`: whose number is sampled as well."""

    def __init__(self, client: Client, nodes: FakeNodes | None = None) -> None:
        self.timeline = Timeline()
        self.began: dict[str, float] = {}
        """When the process of each replica that was ever there began, by the replica's id."""
        self._client = client
        self._nodes = nodes
        self._task: asyncio.Task[None] | None = None

    @property
    def now(self) -> Sample:
        """The latest sample."""
        return self.timeline.samples[-1]

    async def until(self, holds: Callable[[Sample], object], timeout_s: float) -> float | None:
        """Wait until a sample of now or later is so; return when, or None if the time is up."""
        since, give_up = time.monotonic(), time.monotonic() + timeout_s
        while time.monotonic() < give_up:
            if (at := self.timeline.first(holds, since)) is not None:
                return at
            await asyncio.sleep(POLL_S)
        return None

    async def __aenter__(self) -> Self:
        await self._sample()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            with suppress(CallError):  # a router that is being replaced
                await self._sample()
            await asyncio.sleep(POLL_S)

    async def _sample(self) -> None:
        status = await self._client.status()
        num_nodes = 1 if self._nodes is None else len(await asyncio.to_thread(self._nodes.nodes))
        self.timeline.samples.append(sample(status, time.monotonic(), num_nodes))
        for replica in status.replicas:
            if replica.id not in self.began and replica.pid:
                self._note_begin(replica.id, replica.pid)

    def _note_begin(self, replica: str, pid: int) -> None:
        for process in tree(pid)[:1]:
            self.began[replica] = began_at(process)


def began_at(process: Process) -> float:
    """Return when a process began, on the monotonic clock."""
    return time.monotonic() - started_s_ago(process)


def sample(status: GetStatusResponse, at: float, num_nodes: int) -> Sample:
    """Return what a router says, for its one model."""
    known = [model.target for model in status.models if model.has_outlook]
    return Sample(
        at=at,
        target=sum(known) if known else None,
        states={replica.id: replica.state for replica in status.replicas},
        num_queued=status.router.num_queued_requests,
        num_running=status.router.num_running_requests,
        num_nodes=num_nodes,
    )
