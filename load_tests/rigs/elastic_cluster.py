"""`octavo serve` with a configuration of its own, on a Ray of its own or on one that is there, and the commands that
operate it: what the rigs of elasticity hold to their bars."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from octavo.client import Client

from load_tests.rigs.fake_nodes import ENVIRONMENT
from load_tests.rigs.router_rig import ROOT
from load_tests.server import ServerProcess

START_S = 900.0
"""The model may have to be fetched and packed first."""
COMMAND_S = 180.0
PORT = "\n[serve]\nport = 0\n"
"""A free one at the start, and from then on the one in use."""


class CommandFailedError(Exception):
    """A command of `octavo` did not end with 0; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A cluster that is ready. `config` is its file."""

    client: Client
    ready: dict[str, Any]
    pid: int
    config: Path

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    @property
    def ray_address(self) -> str:
        return str(self.ready["ray_address"])

    async def apply(self, config: str) -> None:
        """Have it be what `config`, TOML, says. Raises CommandFailedError."""
        await asyncio.to_thread(self.config.write_text, config + PORT)
        await self.octavo("apply", str(self.config), "--ray-address", self.ray_address)

    async def octavo(self, *arguments: str) -> str:
        """Run a command; return what it printed. Raises CommandFailedError."""
        process = await asyncio.create_subprocess_exec(
            *("env", *(f"{name}={value}" for name, value in ENVIRONMENT.items())),
            *(sys.executable, "-m", "cluster.cli", *arguments),
            cwd=ROOT,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(COMMAND_S):
                said, complained = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
        if process.returncode != 0:
            raise CommandFailedError(f"octavo {' '.join(arguments)}: {complained.decode(errors='replace')[-600:]}")
        return said.decode()


@asynccontextmanager
async def serving(
    config: str, *, ray_address: str = "", variables: Mapping[str, str] = MappingProxyType({})
) -> AsyncIterator[Cluster]:
    """A cluster of `config`, TOML, for the scope, with more environment `variables`. Raises ServerError when it does
    not get ready."""
    command = [sys.executable, "-m", "cluster.cli", "serve"]
    if ray_address:
        command += ["--ray-address", ray_address]
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        file = Path(folder) / "cluster.toml"
        file.write_text(config + PORT)
        environment = {**ENVIRONMENT, **variables}
        process = ServerProcess((*command, "--config", str(file)), environment, Path(folder) / "log")
        try:
            ready = json.loads(await asyncio.to_thread(process.await_line, "{", START_S))
            async with Client(ready["address"]) as client:
                yield Cluster(client, ready, process.pid, file)
        finally:
            await asyncio.to_thread(process.stop)
