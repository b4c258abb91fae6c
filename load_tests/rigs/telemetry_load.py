"""A load that has something of all that dashboards and alerts show: tenants, prefixes, more than one replica can take,
and what goes wrong: requests that break a rule or name no model, deadlines that are missed, a replica that dies."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from contextlib import AsyncExitStack

from octavo.client import Client
from octavo.client.errors import CallError
from octavo.client.options import ClientOptions
from octavo.client.request import GenerateOptions

TENANT_HEADER = "x-tenant"
TENANTS = ("acme", "globex", "initech")
PER_TENANT = 6
"""Requests at once."""
PREFIXES, PREFIX_TOKENS = 6, 64
CONFIG = f"""
model = "fake"
[engine]
engine = "fake"
fake_step_s = 0.005
max_num_sequences = 8
num_blocks = 64
max_model_len = 1024
lookup_tokens = 4
[scaling]
max_replicas = 2
downscale_delay_s = 3
[router]
tenant_header = "{TENANT_HEADER}"
"""


class Load:
    """Sends to `address` while its scope lasts. `outcomes` counts how requests ended: "OK" or the reason. `traced`: the
    share of requests whose spans are asked for."""

    def __init__(self, address: str, *, seed: int = 1, traced: float = 1.0) -> None:
        self.outcomes: Counter[str] = Counter()
        self.trace_ids: list[str] = []
        """Of traced requests that were answered."""
        self._address, self._traced = address, traced
        self._random = random.Random(seed)
        self._prefixes = [[self._random.randrange(1, 200) for _ in range(PREFIX_TOKENS)] for _ in range(PREFIXES)]
        self._scope = AsyncExitStack()
        self._tasks: list[asyncio.Task[None]] = []
        self._clients: list[Client] = []

    async def __aenter__(self) -> Load:
        for tenant in TENANTS:
            options = ClientOptions(metadata=((TENANT_HEADER, tenant),))
            self._clients.append(await self._scope.enter_async_context(Client(self._address, options=options)))
        await self._be_late()
        self._tasks = [asyncio.create_task(self._go_on(client)) for client in self._clients for _ in range(PER_TENANT)]
        return self

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._scope.aclose()

    async def _be_late(self) -> None:
        """Send what misses its deadline. As long as a router knows no speeds it cannot refuse it at once."""
        await asyncio.gather(*(self._send(self._clients[0], {"max_tokens": 900}, within_s=0.6) for _ in range(3)))

    async def go_wrong(self) -> None:
        """Send what is refused at once."""
        client = self._clients[0]
        await asyncio.gather(
            self._send(client, {"temperature": -1.0}),
            self._send(client, {}, model="nobody"),
            *(self._send(client, {"max_tokens": 900}, within_s=0.05) for _ in range(4)),
        )

    async def _go_on(self, client: Client) -> None:
        while True:
            await self._send(client, {"max_tokens": self._random.randrange(20, 300), "temperature": 0.0})

    async def _send(self, client: Client, options: GenerateOptions, *, model: str = "", within_s: float = 60.0) -> None:
        prompt = [*self._random.choice(self._prefixes), *(self._random.randrange(1, 200) for _ in range(16))]
        trace_id, is_traced = f"{self._random.getrandbits(128):032x}", self._random.random() < self._traced
        traceparent = f"00-{trace_id}-{self._random.getrandbits(64):016x}-{is_traced:02x}"
        try:
            answer = client.generate(prompt, model=model, timeout=within_s, traceparent=traceparent, **options)
            await answer.complete()
            self.outcomes["OK"] += 1
            self.trace_ids += [trace_id] * is_traced
        except CallError as error:
            self.outcomes[error.reason] += 1


def kill(pid: int) -> None:
    """Have a replica die at once. `pid` is one that the cluster announced."""
    os.kill(pid, signal.SIGKILL)
