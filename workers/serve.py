"""The replica as Ray Serve sees it: a process with one engine and a data port.

    start   tracing and logging -> model files -> secret -> engine and its thread -> data port; how far is told
    serve   routers come to the data port; Serve only asks for the address (once) and for health
    drain   when told to: health checks fail from now on, so that Serve replaces this one, and it stops meanwhile
    stop    announce draining -> wait for what runs -> close port and engine -> send the last spans

Owns the order of these and nothing of the steps themselves. Serve's own request path carries no requests.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import ray
from ray import serve

from workers.build import start_engine
from workers.config import EngineConfig
from workers.data_plane import DataPlaneServer
from workers.handshake import PROTOCOL, ClusterKeys
from workers.start import FETCHING, LOADING, Progress, Start, untold
from workers.step_telemetry import observe
from workers.types import Boot

LOOPBACK = "127.0.0.1"
STOP_MARGIN_S = 3.0
"""Of the time that Serve gives for a graceful stop, twice this is kept: for handing over what the drain has not seen
end, and for closing."""

_log = logging.getLogger(__name__)


class Worker:
    """The user class of the deployment. `secret` says the cluster's secret; it blocks, and is called once.

    `config.threads` is final here. `graceful_shutdown_timeout_s` is what Serve was told as well. `progress` hears how
    far the start has come. `name` is what requests call the model, if not as its files do.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        *,
        boot: Boot,
        config: EngineConfig,
        model: str,
        secret: Callable[[], bytes],
        graceful_shutdown_timeout_s: float,
        progress: Progress = untold,
        name: str = "",
    ) -> None:
        self._name = name
        self._draining: asyncio.Task[bool] | None = None
        self._drain_grace_s = max(0.0, graceful_shutdown_timeout_s - 2 * STOP_MARGIN_S)
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        start = Start(self._replica_id, progress)
        async with start.told():
            await self._start(start, boot, config, model, secret)

    async def _start(
        self, start: Start, boot: Boot, config: EngineConfig, model: str, secret: Callable[[], bytes]
    ) -> None:
        self._process = await asyncio.to_thread(boot.start_process, "worker")
        start.reach(FETCHING)
        files = await asyncio.to_thread(boot.model_files, model)
        keys = ClusterKeys.derive(await asyncio.to_thread(secret))
        start.reach(LOADING)
        host, credentials = data_host(), None
        if host != LOOPBACK:
            from workers.peer_tls import server_credentials  # takes a while, and one node does not need it

            credentials = server_credentials(keys.data_plane_tls)
        self._server = DataPlaneServer(
            replica_id=self._replica_id, key=keys.data_plane, host=host, credentials=credentials
        )
        # In a thread that ends: as long as a second one has a team of OpenMP's threads, libgomp counts more of them
        # than cores, and lets those of the engine's own thread sleep after every operator of torch.
        loader = ThreadPoolExecutor(1, "octavo-loader")
        load = partial(start_engine, config, files, self._server.notify, hash_key=keys.prefix_hash, reach=start.reach)
        try:
            self._engine = await asyncio.get_running_loop().run_in_executor(loader, load)
        finally:
            loader.shutdown(wait=False)
        await self._server.start(self._engine, observe(self._engine, self._replica_id, self._name))
        _log.info("replica %s serves %s at %s", self._replica_id, self._engine.info.model, self._server.address)

    def record_replica_metadata(self) -> dict[str, str | int]:
        """Tell routers, through Serve, where the data port is. Serve asks once, after the start."""
        return {
            "addr": self._server.address,
            "is_encrypted": self._server.is_encrypted,
            "replica_id": self._replica_id,
            "model": self._engine.info.model,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "protocol": PROTOCOL,
            "memory": self._engine.info.memory,
            "metrics": self._process.metrics_address,
        }

    def check_health(self) -> None:
        """Raises RuntimeError when this replica can serve nobody any more; Serve then replaces it."""
        if self._draining is not None:
            raise RuntimeError("this replica was told to drain")
        if self._engine.failure is not None:
            raise RuntimeError(f"the engine failed: {self._engine.failure!r}")
        if not self._engine.is_alive:
            raise RuntimeError("the engine's thread has ended")

    async def drain(self, replica_id: str) -> bool:
        """Told to all replicas: the one that is meant takes nothing new, hands over what has not ended within the grace
        and is replaced by Serve. Return whether this is the one; it does not wait for its end, which Serve would take
        for a request."""
        is_meant: bool = replica_id == self._replica_id
        if is_meant:
            self._begin_drain()
        return is_meant

    def _begin_drain(self) -> asyncio.Task[bool]:
        if self._draining is None:
            self._draining = asyncio.create_task(self._drain(), name="drain")
        return self._draining

    async def _drain(self) -> bool:
        """Return whether all that ran has ended here."""
        is_drained = await self._server.drain(self._drain_grace_s)
        if not is_drained:
            _log.warning("replica %s hands over %d works unfinished", self._replica_id, self._server.num_works)
            await self._server.stop()  # routers go on with them elsewhere
        return is_drained

    async def __del__(self) -> None:
        """Serve's word for a graceful stop: finish what runs, then close."""
        if not hasattr(self, "_engine"):
            return
        await self._begin_drain()
        await self._server.stop()
        self._engine.close()
        await asyncio.to_thread(self._engine.join, 1.0)
        await asyncio.to_thread(self._process.stop)


def data_host() -> str:
    """Return the address that this node's data ports bind: loopback where all of Ray is on it, else the node's own,
    and then with TLS."""
    node = ray.util.get_node_ip_address()
    if ipaddress.ip_address(node).is_loopback:
        return LOOPBACK
    return f"[{node}]" if ":" in node else str(node)
