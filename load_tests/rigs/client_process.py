"""A client in a process of its own, told what to do by lines of JSON on its standard input, one answer to each.

    async with ClientProcess("tenant_client", job) as client:
        report = await client.ask({"duration_s": 8.0})

Its first answer says that it is ready. It ends at the end of its input, so also when this process dies.
"""

from __future__ import annotations

import asyncio
import json
import sys
from types import TracebackType
from typing import Any, Self

from cluster.grpc_environment import process_environment
from load_tests.rigs.router_rig import ROOT

READY_S = 30.0
STOP_S = 5.0
_MAX_LINE = 16 << 20


class ClientProcess:
    """`name`: a module of this folder."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        self._name = name
        self._job = job
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", f"load_tests.rigs.{self._name}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
            limit=_MAX_LINE,
            env=process_environment(),
        )
        try:
            async with asyncio.timeout(READY_S):
                await self.ask(self._job)
        except BaseException:
            await self._stop(self._process)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        await self._stop(self._process)

    async def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return the answer. Raises RuntimeError if the process has ended instead."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        line = await process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._name} ended with code {await process.wait()}; it says above why")
        report: dict[str, Any] = json.loads(line)
        return report

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        process.stdin.close()
        try:
            await asyncio.wait_for(process.wait(), STOP_S)
        except TimeoutError:
            process.kill()
            await process.wait()
