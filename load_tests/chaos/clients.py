"""Clients that ask for one answer after the other while faults strike, through octavo.client and nothing else.

Some know the routers' common address alone, some also where each router was at the start, as from a list that nobody
renews, and one connects anew for every answer. Most requests have deadlines that allow for faults, some have none, and
some so short a one that a fault makes them late. Every piece of every answer is looked at.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

from octavo.client import CallError, Client

from load_tests.chaos.verdict import Reply, content
from load_tests.rigs.resume_asks import Ask
from load_tests.rigs.resume_stream import Answer, Stream

PAUSE_S = 0.2
"""What is longer is kept."""
OVERDUE_S = 5.0
"""After its deadline a request that has not ended hangs."""
ENDLESS_S = 150.0
"""The same for one without a deadline, after its begin."""
PATIENT_S, HASTY_S = (60.0, 120.0), (2.0, 10.0)
HASTY, UNBOUND = 0.1, 0.1
"""Shares of requests with a short deadline, and without any."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What is asked, and what answers it undisturbed, in how many seconds."""

    ask: Ask
    answer: Answer
    usual_s: float


@dataclass(slots=True)
class _Reading:
    """One answer as it comes; times are those of the clock."""

    stream: Stream
    begun: float
    last: float
    first: float | None = None
    pauses: list[tuple[float, float]] | None = None

    def passed(self, now: float) -> None:
        """Something came, or the end."""
        if now - self.last > PAUSE_S:
            self.pauses = [*(self.pauses or []), (self.last, now)]
        self.last = now


class Clients:
    """`address`: of all routers; `others`: where each was at the start. `replies` are those that are over."""

    def __init__(self, address: str, others: Sequence[str], rng: random.Random) -> None:
        self.replies: list[Reply] = []
        self.num_open = 0
        self._address = address
        self._others = tuple(others)
        self._rng = rng
        self._began = time.monotonic()
        self._is_over = False
        self._numbers = itertools.count()

    @property
    def now_s(self) -> float:
        """Seconds since these clients began."""
        return time.monotonic() - self._began

    def stop(self) -> None:
        """Ask for nothing more; what was asked for may end."""
        self._is_over = True

    async def run(self, pool: Sequence[Expected], *, clients: int, streams: int) -> None:
        """Ask for answers of `pool` until `stop`; each client has `streams` open. Return when all are over."""
        self._began = time.monotonic()
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as asking:
            for number in range(clients):
                targets = (self._address, *self._others) if number % 2 else (self._address,)
                client = None if number == 0 else await stack.enter_async_context(Client(targets))
                for _ in range(streams):
                    asking.create_task(self._ask_on(client, pool))

    async def ask_all(self, pool: Sequence[Expected]) -> None:
        """Ask for all of `pool` at once; return when all are over."""
        async with Client(self._address) as client, asyncio.TaskGroup() as asking:
            for expected in pool:
                asking.create_task(self._ask(client, expected, PATIENT_S[1]))

    async def learn(self, asks: Sequence[Ask], *, at_once: int) -> list[Expected]:
        """Ask undisturbed, and return what came. Raises RuntimeError for an answer that did not end well."""
        slots = asyncio.Semaphore(at_once)
        async with Client(self._address) as client:

            async def learn_one(ask: Ask) -> Expected:
                async with slots:
                    reading = await self._read(client, ask, None)
                stream = reading.stream
                if stream.error or not stream.is_ended:
                    raise RuntimeError(f"undisturbed, {ask.name} ended with {stream.error or 'nothing'}")
                return Expected(ask, stream.answer, reading.last - reading.begun)

            return await asyncio.gather(*map(learn_one, asks))

    async def _ask_on(self, client: Client | None, pool: Sequence[Expected]) -> None:
        while not self._is_over:
            expected, timeout_s = self._rng.choice(pool), self._timeout_s()
            if client is not None:
                await self._ask(client, expected, timeout_s)
                continue
            async with Client(self._address) as own:
                await self._ask(own, expected, timeout_s)

    def _timeout_s(self) -> float | None:
        draw = self._rng.random()
        if draw < UNBOUND:
            return None
        return self._rng.uniform(*(HASTY_S if draw < UNBOUND + HASTY else PATIENT_S))

    async def _ask(self, client: Client, expected: Expected, timeout_s: float | None) -> None:
        self.num_open += 1
        try:
            reading = await self._read(client, expected.ask, timeout_s)
        finally:
            self.num_open -= 1
        self.replies.append(self._reply(reading, expected, timeout_s))

    async def _read(self, client: Client, ask: Ask, timeout_s: float | None) -> _Reading:
        now = time.monotonic()
        reading = _Reading(Stream(ask), now, now)
        stream = reading.stream
        stream.is_begun = True
        try:
            async with asyncio.timeout(ENDLESS_S if timeout_s is None else timeout_s + OVERDUE_S):
                async for delta in client.generate(ask.prompt, timeout=timeout_s, **ask.options):
                    now = time.monotonic()
                    stream.took(delta, now)
                    reading.passed(now)
                    reading.first = reading.first or now
                stream.is_ended = True
        except CallError as error:
            stream.error = f"{error.code.name}/{error.reason}"
            stream.is_ended = True
        except TimeoutError:
            stream.error = "no end"
        reading.passed(time.monotonic())
        return reading

    def _reply(self, reading: _Reading, expected: Expected, timeout_s: float | None) -> Reply:
        stream, began = reading.stream, self._began
        return Reply(
            name=f"{next(self._numbers)}: {stream.ask.name}",
            content=content(stream, expected.answer),
            error=stream.error,
            begun_s=reading.begun - began,
            ended_s=reading.last - began if stream.is_ended else None,
            timeout_s=timeout_s,
            usual_s=expected.usual_s,
            first_s=None if reading.first is None else reading.first - reading.begun,
            pauses=tuple(_later(reading, began)),
        )


def _later(reading: _Reading, began: float) -> Iterator[tuple[float, float]]:
    """Yield the pauses between tokens: before the first one it waits in a queue."""
    for since, to in reading.pauses or ():
        if reading.first is not None and since >= reading.first:
            yield since - began, to - began
