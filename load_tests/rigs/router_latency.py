"""How much later a first token comes through a router than straight from the data port of the same replica.

Fifty one-token requests a second, Poisson, from one process: over the data port, over a Session, over Generate, in
turns of less than a second, so that all meet the same machine. Beside them, over the data port behind a process that
passes bytes on (`byte_proxy.py`): what any router adds that is made of grpc.aio. Each counts from when it was due. All
clients are equally lean: one protobuf message there, one back, looked at as far as the token, over connections made by
hand. (A call of a grpc.aio client takes about half a millisecond more of processor time than one made by hand.)

What is added at p99 is by how much further out the 99th percentile lies in the same repetition. It is not the 99th
percentile of what was added to single requests, which nobody can know, as none goes both ways. What a machine does to
any request now and then is in both: where the port's own p99 is many times its p50, it says little of the router.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence

from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.byte_proxy import ByteProxy
from load_tests.rigs.data_port import DataPort
from load_tests.rigs.lean_http2 import Http2
from load_tests.rigs.router_rig import RigConfig, RouterRig

RATE = 50.0
TURN_S = 0.8
TURNS = 15
"""Of each way, in one repetition."""
MAX_ADDED_MS = {"session": (1.0, 3.0), "generate": (2.0, 5.0)}
"""At p50 and p99."""
PROMPT_TOKENS = 16
ANSWER_S = 5.0

_SESSION = "/octavo.v1.InferenceService/Session"
_GENERATE = "/octavo.v1.InferenceService/Generate"

Ask = Callable[[Sequence[int]], Awaitable[float]]


class SessionAsk:
    """One Session, requests told apart by their names. A `Listener` of its connection."""

    def __init__(self) -> None:
        self._connection: Http2
        self._stream = 0
        self._waiting: dict[str, asyncio.Future[float]] = {}
        self._num_asked = 0
        self.num_ended = 0

    async def connect(self, target: str, *, ca_file: str = "", token: str = "") -> None:
        self._connection = await Http2.connect(target, self, ca_file=ca_file, token=token)
        self._stream = self._connection.open(_SESSION)

    def close(self) -> None:
        self._connection.close()

    async def ask(self, prompt: Sequence[int]) -> float:
        self._num_asked += 1
        name = str(self._num_asked)
        answered = self._waiting[name] = asyncio.get_running_loop().create_future()
        start = pb.Start(request_id=name, request=_request(prompt))
        self._connection.send(self._stream, pb.SessionRequest(starts=[start]).SerializeToString())
        return await answered

    def arrived(self, stream: int, message: bytes) -> None:
        now = time.monotonic()
        for event in pb.SessionResponse.FromString(message).events:
            if event.HasField("terminal"):
                self.num_ended += 1
            elif event.delta.token_ids and event.request_id in self._waiting:
                self._waiting.pop(event.request_id).set_result(now)

    def ended(self, stream: int, status: str) -> None:
        for answered in self._waiting.values():
            answered.set_exception(ConnectionError(f"the stream ended with status {status}"))
        self._waiting.clear()


class GenerateAsk:
    """A call for each request. A `Listener` of its connection."""

    def __init__(self) -> None:
        self._connection: Http2
        self._waiting: dict[int, asyncio.Future[float]] = {}
        self.num_ended = 0

    async def connect(self, target: str, *, ca_file: str = "", token: str = "") -> None:
        self._connection = await Http2.connect(target, self, ca_file=ca_file, token=token)

    def close(self) -> None:
        self._connection.close()

    async def ask(self, prompt: Sequence[int]) -> float:
        stream = self._connection.call(_GENERATE, _request(prompt).SerializeToString())
        answered = self._waiting[stream] = asyncio.get_running_loop().create_future()
        return await answered

    def arrived(self, stream: int, message: bytes) -> None:
        now = time.monotonic()
        deltas = pb.GenerateResponse.FromString(message).deltas
        if deltas and deltas[0].token_ids and stream in self._waiting:
            self._waiting.pop(stream).set_result(now)

    def ended(self, stream: int, status: str) -> None:
        if status == "0":
            self.num_ended += 1
        elif stream in self._waiting:
            self._waiting.pop(stream).set_exception(ConnectionError(f"ended with status {status}"))


def _request(prompt: Sequence[int]) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompt=types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=prompt)), max_tokens=1, ignore_eos=True
    )


async def measure(settings: Settings, notes: Notes) -> None:
    rng = random.Random(1)
    for _ in settings.rounds():
        with RouterRig(RigConfig(step_s=0.0, prefix_cache=False)) as rig:
            name, address = next(iter(rig.replicas.items()))
            with ByteProxy(address) as passes_on:
                port, proxy = (DataPort(name, rig.secret, router_id=way) for way in ("bare", "proxy"))
                session, generate = SessionAsk(), GenerateAsk()
                for each, target in (
                    (port, address),
                    (proxy, passes_on.address),
                    (session, rig.address),
                    (generate, rig.address),
                ):
                    await each.connect(target)
                asks = {"port": port.ask, "proxy": proxy.ask, "session": session.ask, "generate": generate.ask}
                await _ask_all(asks, settings, rng, notes)
                await asyncio.sleep(0.1)
                sent = {what: notes.of(what, "requests")[-1] for what in ("session", "generate")}
                notes.add("terminals of a session", sent=sent["session"], ended=session.num_ended)
                notes.add("terminals of generate", sent=sent["generate"], ended=generate.num_ended)
                for each in (port, proxy, session, generate):
                    each.close()


async def _ask_all(asks: dict[str, Ask], settings: Settings, rng: random.Random, notes: Notes) -> None:
    """Ask in turns and note what each way took; a first request of each opens its stream and is not counted."""
    times: dict[str, list[float]] = {what: [] for what in asks}
    for ask in asks.values():
        await ask(_prompt(rng))
    for turn in range(len(asks) if settings.is_quick else TURNS):
        order = list(asks)
        first = turn % len(order)
        for what in (*order[first:], *order[:first]):
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
            detail = (
                f"{figure(through, 'ms')}; data port {figure(port, 'ms')}; {RATE:g} requests/s; "
                f"bytes passed on by grpc.aio add {figure(_added(notes, 'proxy', key), 'ms')}"
            )
            bars.append(
                at_most(f"{call}: added to the first token, {point}, ms", _added(notes, call, key), limit, detail)
            )
    return bars


def _added(notes: Notes, what: str, key: str) -> float | None:
    """Return the median over the repetitions of what one way adds in each."""
    pairs = zip(notes.of(what, key), notes.of("port", key), strict=False)
    added = [through - port for through, port in pairs]
    return statistics.median(added) if added else None


if __name__ == "__main__":
    sys.exit(main("router_latency", measure, judge))
