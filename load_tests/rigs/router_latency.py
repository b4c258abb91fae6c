"""How much later a first token comes through a router than straight from the data port of the same replica.

Fifty one-token requests a second, Poisson, from one process: over the data port, over a Session, over Generate, in
turns of a few seconds, so that all three meet the same machine. Each counts from when it was due. All three clients are
equally lean: one protobuf message there, one back, looked at as far as the token.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc.aio
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, difference, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.data_port import DataPort
from load_tests.rigs.router_rig import RigConfig, RouterRig

RATE = 50.0
TURN_S = 4.0
TURNS = 3
"""Of each way, in one repetition."""
MAX_ADDED_MS = {"session": (1.0, 3.0), "generate": (2.0, 5.0)}
"""At p50 and p99."""
PROMPT_TOKENS = 16
ANSWER_S = 5.0

Ask = Callable[[Sequence[int]], Awaitable[float]]


class SessionAsk:
    """One Session, requests told apart by their names."""

    def __init__(self, stub: Any) -> None:
        self._call = stub.Session()
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._num_asked = 0
        self._writing = asyncio.Lock()
        """Two tasks that write at once end a stream."""
        self.num_ended = 0
        self.reader = asyncio.create_task(self._read())

    async def ask(self, prompt: Sequence[int]) -> float:
        self._num_asked += 1
        name = str(self._num_asked)
        answered = self._waiting[name] = asyncio.get_running_loop().create_future()
        start = pb.Start(request_id=name, request=_request(prompt))
        async with self._writing:
            await self._call.write(pb.SessionRequest(starts=[start]))
        return await answered

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            now = time.monotonic()
            for event in message.events:
                if event.HasField("terminal"):
                    self.num_ended += 1
                elif event.delta.token_ids and event.request_id in self._waiting:
                    self._waiting.pop(event.request_id).set_result(now)


class GenerateAsk:
    """A call for each request."""

    def __init__(self, stub: Any) -> None:
        self._stub = stub
        self.num_ended = 0

    async def ask(self, prompt: Sequence[int]) -> float:
        call = self._stub.Generate(_request(prompt))
        message = await call.read()
        now = time.monotonic()
        assert message.deltas[0].token_ids
        while await call.read() is not grpc.aio.EOF:
            pass
        self.num_ended += await call.code() is grpc.StatusCode.OK
        return now


def _request(prompt: Sequence[int]) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=prompt)), max_tokens=1, ignore_eos=True
    )


async def measure(settings: Settings, notes: Notes) -> None:
    rng = random.Random(1)
    for _ in settings.rounds():
        with RouterRig(RigConfig(step_s=0.0, prefix_cache=False)) as rig:
            name, address = next(iter(rig.replicas.items()))
            async with DataPort(address, name, rig.secret) as port, grpc.aio.insecure_channel(rig.address) as channel:
                stub = InferenceServiceStub(channel)
                session, generate = SessionAsk(stub), GenerateAsk(stub)
                await _ask_all(
                    {"port": port.ask, "session": session.ask, "generate": generate.ask}, settings, rng, notes
                )
                await asyncio.sleep(0.1)
                sent = {what: notes.of(what, "requests")[-1] for what in ("session", "generate")}
                notes.add("terminals of a session", sent=sent["session"], ended=session.num_ended)
                notes.add("terminals of generate", sent=sent["generate"], ended=generate.num_ended)
                session.reader.cancel()


async def _ask_all(asks: dict[str, Ask], settings: Settings, rng: random.Random, notes: Notes) -> None:
    """Ask in turns and note what each way took; a first request of each opens its stream and is not counted."""
    times: dict[str, list[float]] = {what: [] for what in asks}
    for ask in asks.values():
        await ask(_prompt(rng))
    for turn in range(TURNS):
        order = list(asks)
        for what in (*order[turn:], *order[:turn]):
            times[what] += await _turn(asks[what], settings.seconds(TURN_S, 0.5), rng)
    for what, each in times.items():
        each.sort()
        notes.add(what, requests=len(each) + 1, p50_ms=1e3 * _at(each, 0.5), p99_ms=1e3 * _at(each, 0.99))


async def _turn(ask: Ask, duration_s: float, rng: random.Random) -> list[float]:
    async def one(due: float) -> float:
        return await asyncio.wait_for(ask(_prompt(rng)), ANSWER_S) - due

    tasks = []
    due = start = time.monotonic() + 0.05
    while (due := due + rng.expovariate(RATE)) < start + duration_s:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        tasks.append(asyncio.create_task(one(due)))
    return list(await asyncio.gather(*tasks))


def _prompt(rng: random.Random) -> list[int]:
    return rng.choices(range(300, 1_000), k=PROMPT_TOKENS)


def _at(ascending: Sequence[float], share: float) -> float:
    return ascending[min(int(share * len(ascending)), len(ascending) - 1)]


def judge(notes: Notes) -> list[Bar]:
    """Return the bars: medians of the repetitions, of which each compares within itself."""
    bars = []
    for call, limits in MAX_ADDED_MS.items():
        for point, limit in zip(("p50", "p99"), limits, strict=True):
            key = f"{point}_ms"
            through, port = notes.median(call, key), notes.median("port", key)
            detail = f"{figure(through, 'ms')}; data port {figure(port, 'ms')}; {RATE:g} requests/s"
            bars.append(
                at_most(f"{call}: added to the first token, {point}, ms", difference(through, port), limit, detail)
            )
    return bars


if __name__ == "__main__":
    sys.exit(main("router_latency", measure, judge))
