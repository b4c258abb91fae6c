"""A router and a replica of the engine `transformers` in this process, over real gRPC, and a client of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from octavo.client import Client

from cluster.models import fetch_model
from router.config import RouterConfig
from router.dispatcher import Dispatcher
from router.model import ServedModel
from router.server import RouterServer
from router.types import ReplicaAddress
from tests.data_plane.rig import KEYS, TIMES, make_dispatcher
from workers.build import build_engine, warm
from workers.config import EngineConfig
from workers.data_plane import DataPlaneServer
from workers.thread import EngineThread


@dataclass
class Served:
    client: Client
    server: RouterServer
    dispatcher: Dispatcher
    replicas: list[DataPlaneServer]
    engines: list[EngineThread]

    async def lose(self, number: int) -> None:
        """End a replica as a crash would."""
        await self.replicas[number].stop(0.0)
        self.engines[number].close()

    @property
    def num_works(self) -> int:
        return sum(replica.num_works for replica in self.replicas)


NewServed = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(tmp_path: Path) -> NewServed:
    """Serves the model in a directory."""

    @asynccontextmanager
    async def serving(
        directory: Path, *, num_replicas: int = 1, max_message_bytes: int = 1 << 24, **options: Any
    ) -> AsyncIterator[Served]:
        files = fetch_model(str(directory), cache_dir=tmp_path / "cache", any_architecture=True)
        config = EngineConfig(**{"engine": "transformers", "threads": 1, "block_size": 4, "num_blocks": 64, **options})
        replicas, engines = [], []
        for number in range(num_replicas):
            engine = await asyncio.to_thread(
                build_engine, config, files, hash_key=KEYS.prefix_hash, threads=config.threads
            )
            warm(engine)
            replica = DataPlaneServer(replica_id=f"replica-{number}", key=KEYS.data_plane, times=TIMES)
            engines.append(EngineThread(engine, replica.notify))
            await replica.start(engines[-1])
            replicas.append(replica)
        dispatcher = make_dispatcher()
        dispatcher.start()
        dispatcher.update_replicas(
            [ReplicaAddress(replica_id=f"replica-{i}", address=r.address) for i, r in enumerate(replicas)]
        )
        model = ServedModel.from_files(files, name="fake")
        router = RouterConfig(max_message_bytes=max_message_bytes)
        server = RouterServer(router, {"fake": model}, dispatcher, router_id="router-1", version="0.0")
        port = server.bind("127.0.0.1", 0)
        await server.start()
        try:
            async with Client(f"127.0.0.1:{port}") as client:
                yield Served(client, server, dispatcher, replicas, engines)
                assert server.intake.num_open == 0
                dispatcher.check_integrity()
        finally:
            await server.stop()
            await dispatcher.stop()
            for replica, engine_thread in zip(replicas, engines, strict=True):
                await replica.stop()
                engine_thread.close()
                assert await asyncio.to_thread(engine_thread.join, 40.0)

    return serving
