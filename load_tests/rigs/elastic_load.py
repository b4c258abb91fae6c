"""Clients that keep so many answers of the fake engine open as a shape says, and know each answer beforehand.

    async with Crowd(client, tokens=50) as crowd:
        await crowd.follow(square(16, 4, period_s=30), seconds=90)

As many open answers as `capacity` of one replica says are that replica's load, whatever the machine's speed: the engine
runs them together. When the shape falls, what is open ends by itself; when it rises, what is missing begins at once.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

from octavo.client import CallError, Client, Finish, FinishReason

from load_tests.rigs.resume_asks import fake_asks
from load_tests.rigs.resume_stream import Answer, Stream

Shape = Callable[[float], int]
"""How many answers are open at a time, in seconds from the beginning."""
ANSWER_S = 120.0
"""For one answer, whatever happens to it, for its client alone."""
_TICK_S = 0.02


def constant(level: int) -> Shape:
    return lambda _: level


def square(high: int, low: int, *, period_s: float) -> Shape:
    """Half a period `high`, half a period `low`, and so on."""
    return lambda at: high if at % period_s < period_s / 2 else low


def noisy(level: int, share: float, *, every_s: float, seed: int) -> Shape:
    """Another level every so often, evenly from `share` below `level` to `share` above it."""

    def shape(at: float) -> int:
        rng = random.Random(f"{seed} {int(at / every_s)}")
        return round(level * rng.uniform(1 - share, 1 + share))

    return shape


class Crowd:
    """`tokens` is what each answer has, `deadline_s` what clients tell routers; None: nothing. `streams` are all
    answers."""

    def __init__(self, client: Client, *, tokens: int, deadline_s: float | None = None, seed: int = 0) -> None:
        self.streams: list[Stream] = []
        self._client = client
        self._tokens = tokens
        self._deadline_s = deadline_s
        self._rng = random.Random(seed)
        self._open: set[asyncio.Task[None]] = set()

    @property
    def num_open(self) -> int:
        return len(self._open)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Let all end; cut them off when something went wrong."""
        if kind is not None:
            for task in self._open:
                task.cancel()
        await asyncio.gather(*self._open, return_exceptions=kind is not None)

    async def follow(self, shape: Shape, seconds: float) -> None:
        """Keep open what `shape` says, for so long; what is open then stays so."""
        began = time.monotonic()
        while (at := time.monotonic() - began) < seconds:
            self.begin(shape(at) - len(self._open))
            await asyncio.sleep(_TICK_S)

    def begin(self, number: int) -> list[Stream]:
        """Begin so many, at once."""
        streams = [Stream(ask) for ask in fake_asks(max(0, number), self._tokens, self._rng)]
        for stream in streams:
            task = asyncio.create_task(self._ask(stream))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        self.streams += streams
        return streams

    async def _ask(self, stream: Stream) -> None:
        stream.is_begun = True
        generation = self._client.generate(stream.ask.prompt, timeout=self._deadline_s, **stream.ask.options)
        try:
            async with asyncio.timeout(ANSWER_S):
                async for delta in generation:
                    stream.took(delta, time.monotonic())
        except CallError as error:
            stream.error = f"{error.code.name}/{error.reason}"
        except TimeoutError:
            stream.error = f"no end within {ANSWER_S:g} s"
            return
        stream.is_ended = True
        if generation.decision is not None:
            stream.attempts = generation.decision.attempt


def outcome(streams: Iterable[Stream]) -> dict[str, Any]:
    """Return what a run notes of its answers: requests and terminals, those that were not as they must be, and how
    many another replica went on with."""
    asked = list(streams)
    found = Counter(stream.differs(_expected(stream)) for stream in asked)
    gaps = [stream.largest_gap_s for stream in asked if stream.largest_gap_s is not None]
    return {
        "sent": len(asked),
        "ended": sum(stream.is_ended for stream in asked),
        "right": found[""],
        "wrong": len(asked) - found[""],
        "wrongs": {kind: count for kind, count in found.items() if kind},
        "errors": dict(Counter(stream.error for stream in asked if stream.error)),
        "handed_over": sum(stream.attempts > 1 for stream in asked),
        "gap_max_s": round(max(gaps), 3) if gaps else None,
    }


def _expected(stream: Stream) -> Answer:
    """Return the answer that follows from the prompt; of its text nothing is asked here."""
    return Answer(stream.ask.reference or (), stream.text, Finish(FinishReason.LENGTH))
