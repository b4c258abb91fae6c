"""A cluster under chaos: `octavo serve` as a child of ours, its processes, and what is left of them when it has ended.

On several nodes it is attached to a Ray of `fake_nodes`, whose processes are ours as well. Only processes that descend
from these two are ever found, and others are not signalled.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from load_tests import process_tree
from load_tests.process_tree import Process
from load_tests.rigs import fake_nodes
from load_tests.rigs.fake_nodes import FakeNodes
from load_tests.server import ServerError, ServerProcess

START_S = 900.0
"""A model may have to be fetched and packed first."""
STOP_S, END_S = 90.0, 15.0
"""For the end of the cluster after SIGTERM, and of its processes after that."""
LOOK_S = 1.0
POLL_S = 0.1
CONTROLLER, REPLICA = "ray::ServeController", "ray::ServeReplica"
"""How the titles of Serve's processes begin; routers are replicas to Serve."""


class Cluster:
    """`left` are the processes that it left behind, in words; None until it has ended by itself."""

    def __init__(self, process: ServerProcess, ready: Mapping[str, Any], nodes: FakeNodes | None) -> None:
        self.address = str(ready["address"])
        self.routers: list[str] = list(ready["routers"])
        self.left: list[str] | None = None
        self.seen: dict[Process, str] = {}
        """Every process that was ever found, and its title then."""
        self._process = process
        self._nodes = nodes
        self._roots = [process.pid]
        if nodes is not None:
            self._roots.append(min(nodes.processes(), key=lambda each: each.began).pid)

    def check_alive(self) -> None:
        """Raises ServerError if `octavo serve` has ended."""
        self._process.check_alive()

    def look(self) -> set[int]:
        """Return the pids of all processes that there are now."""
        family = [each for root in self._roots for each in process_tree.tree(root)]
        self.seen.update({each: title(each.pid) for each in family})
        return {each.pid for each in family}

    def find(self, start: str) -> int | None:
        """Return the pid of a process whose title begins so; None if there is none."""
        return next((pid for pid in sorted(self.look()) if title(pid).startswith(start)), None)

    def check(self, pid: int) -> None:
        """Raises LookupError for a process that is none of its own, or has ended: nobody else is ever signalled."""
        if pid not in self.look():
            raise LookupError(f"process {pid} is none of this cluster's")

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that may be lost: all but the head, where Ray's own services are."""
        return [] if self._nodes is None else sorted(self._nodes.nodes().keys() - {fake_nodes.HEAD})

    def lose(self, node: str) -> set[int]:
        """Kill a node with all that runs on it; return the pids. Raises LookupError if there is none."""
        assert self._nodes is not None
        pids = {each.pid for each in process_tree.tree(self._nodes.nodes()[node])}
        self._nodes.lose(node)
        return pids

    async def watch(self) -> None:
        """Look again and again, so that what came and went is remembered."""
        while True:
            await asyncio.to_thread(self.look)
            await asyncio.sleep(LOOK_S)

    def end(self) -> None:
        """Have it end as a user would, and see what is left. Blocks."""
        self.look()
        own = set(process_tree.tree(self._process.pid))
        own |= {each for each, words in self.seen.items() if words.startswith(REPLICA)}
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        give_up = time.monotonic() + STOP_S
        with suppress(ServerError):
            while time.monotonic() < give_up:
                self._process.check_alive()
                time.sleep(POLL_S)
        self.left = self._left(own)

    def ended(self) -> None:
        """Its Ray is gone, too: see what is left of all, and kill it. Blocks."""
        if self.left is not None:
            self.left = sorted({*self.left, *self._left(self.seen)})
        process_tree.await_end([each for each in self.seen if _is_alive(each)], 0.0)

    def _left(self, processes: Collection[Process]) -> list[str]:
        give_up = time.monotonic() + END_S
        while (alive := [each for each in processes if _is_alive(each)]) and time.monotonic() < give_up:
            time.sleep(POLL_S)
        return [f"{self.seen.get(each, '')} ({each.pid})" for each in alive]


@asynccontextmanager
async def serving(
    options: Sequence[str], variables: Mapping[str, str], *, nodes: int, logs: Path | None
) -> AsyncIterator[Cluster]:
    """A cluster that is ready, for the scope, on a Ray of so many `nodes` with one processor each; 0: on its own.
    Whatever happens, none of its processes is there afterwards. `logs`: where to keep what it wrote."""
    cluster: Cluster | None = None
    ray = FakeNodes(cpus=1, max_nodes=nodes) if nodes else None
    try:
        if ray is not None:
            await asyncio.to_thread(ray.__enter__)
            options = (*options, "--ray-address", ray.address)
            variables = {**variables, **fake_nodes.ENVIRONMENT, "OCTAVO_RESOURCES__NUM_CPUS": "1"}
        async with _serving(options, variables, ray, logs) as cluster:
            yield cluster
    finally:
        if ray is not None:
            await asyncio.to_thread(ray.stop)
        if cluster is not None:
            await asyncio.to_thread(cluster.ended)


@asynccontextmanager
async def _serving(
    options: Sequence[str], variables: Mapping[str, str], nodes: FakeNodes | None, logs: Path | None
) -> AsyncIterator[Cluster]:
    command = (sys.executable, "-m", "cluster.cli", "serve", "--port", "0", *options)
    with tempfile.TemporaryDirectory(prefix="oct", dir="/tmp") as name:  # short: Ray keeps sockets below it
        folder = Path(name)
        ray = folder / "r" if nodes is None else nodes.directory / "r"
        own = () if nodes is not None else ("--ray-temp-dir", str(ray))
        process = ServerProcess((*command, *own), variables, folder / "log")
        try:
            ready = json.loads(await asyncio.to_thread(process.await_line, "{", START_S))
            cluster = Cluster(process, ready, nodes)
            watching = asyncio.create_task(cluster.watch())
            try:
                yield cluster
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await asyncio.to_thread(cluster.end)
        finally:
            await asyncio.to_thread(process.stop)
            if logs is not None:
                await asyncio.to_thread(_keep, folder / "log", ray / "session_latest" / "logs", logs)


def _keep(said: Path, ray_logs: Path, logs: Path) -> None:
    logs.mkdir(parents=True, exist_ok=True)
    shutil.copy(said, logs / "octavo-serve.log")
    shutil.copytree(ray_logs, logs / "ray", ignore_dangling_symlinks=True, dirs_exist_ok=True)


def title(pid: int) -> str:
    """Return the beginning of a process's command line; empty if it has ended."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return " ".join(word.decode(errors="replace") for word in words[:3]).strip()[:100]


def _is_alive(process: Process) -> bool:
    return process_tree.tree(process.pid)[:1] == [process]
