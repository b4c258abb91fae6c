"""What it costs that nobody can listen and everybody proves who they are: one load in clear and secured, alternately.

    clear      no TLS, no keys
    secured    TLS and a bearer token on the public port, TLS with certificates of both ends on the data ports

Two rigs of a router and two replicas stand side by side, one loaded at a time. Throughput: closed loops that keep both
cores busy, of long answers (tokens a second) and of one-token answers (requests a second: over Generate each of them is
authenticated). What counts is by which share less comes through; clients do their part of TLS on the same cores.
Latency: one request after the other, clear and secured in turns of one, over connections that have been used; what
counts is by how much the median of the first token is later, again with the client's part. Each repetition compares
within itself, and the median of the repetitions is judged.

Clients are the same on both sides: for throughput the lean ones of the other rigs, grpc.aio over Session and HTTP/2 by
hand over Generate, whose TLS is Python's own and takes more than twice as much of a core; for latency grpc.aio. What
comes through says nothing on a machine that does other things, too: beside it is what all processes took for a token.
Under three minutes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import secrets
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import grpc.aio
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.lean_client import open_channel
from load_tests.rigs.lean_crew import LeanLoad, load, summary
from load_tests.rigs.rig_trust import RigTrust
from load_tests.rigs.router_latency import ANSWER_S
from load_tests.rigs.router_rig import RigConfig, RouterRig

WAYS = ("clear", "secured")
CALLS = ("session", "generate")
STREAMS, PROMPT_TOKENS = 64, 16
OUTPUTS = {"tokens": 256, "requests": 1}
"""What is counted a second, and how long answers are then."""
PAIRS, PAUSE_S = 150, 0.008
"""Of requests whose latency is compared, and the pause before each."""
MAX_LOSS, MAX_ADDED_MS = 0.1, 0.5


class Client:
    """One request after the other, all over one connection, and over one Session or a Generate each."""

    def __init__(self, call: str, target: str, *, ca_file: str = "", token: str = "") -> None:
        self._channel = open_channel(target, ca_file)
        self._stub: Any = InferenceServiceStub(self._channel)
        self._metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._session = self._stub.Session(metadata=self._metadata) if call == "session" else None
        self._name = secrets.token_hex(4)
        """Of its requests: all clients of a tenant share one space of ids."""
        self.num_ended = 0

    async def first_token_s(self, prompt: Sequence[int]) -> float:
        """Ask for one token; return how long it took to come. The answer has ended then."""
        request = pb.GenerateRequest(
            prompt=types_pb2.Prompt(token_ids=types_pb2.TokenIds(ids=prompt)), max_tokens=1, ignore_eos=True
        )
        began = time.monotonic()
        return await asyncio.wait_for(self._ask(request), ANSWER_S) - began

    async def close(self) -> None:
        await self._channel.close()

    async def _ask(self, request: pb.GenerateRequest) -> float:
        """Return when the token came."""
        came_at: float | None = None
        if self._session is None:
            async for message in self._stub.Generate(request, metadata=self._metadata):
                if came_at is None and message.deltas:
                    came_at = time.monotonic()
        else:
            request_id = f"{self._name}-{self.num_ended}"
            await self._session.write(pb.SessionRequest(starts=[pb.Start(request_id=request_id, request=request)]))
            is_ended = False
            while not is_ended and (message := await self._session.read()) is not grpc.aio.EOF:
                now = time.monotonic()
                if came_at is None and any(event.delta.token_ids for event in message.events):
                    came_at = now
                is_ended = any(event.HasField("terminal") for event in message.events)
        assert came_at is not None
        self.num_ended += 1
        return came_at


async def measure(settings: Settings, notes: Notes) -> None:
    clear = RigConfig(replicas=2, step_s=0.0, num_sequences=STREAMS, chunk_tokens=1_024, num_blocks=16_384)
    for repetition in settings.rounds(3):
        with RigTrust() as trust:
            secured = dataclasses.replace(clear, router=trust.router, is_encrypted=True)
            with RouterRig(clear) as clear_rig, RouterRig(secured) as secured_rig:
                rigs = {"clear": clear_rig, "secured": secured_rig}
                for call in CALLS:
                    await _latency(settings, notes, call, rigs, trust)
                for call in CALLS:
                    for what in OUTPUTS:
                        for way in _turn(repetition):
                            counts, cpu_s = await load(rigs[way], _load(settings, call, what, way, trust))
                            figures = summary(counts, cpu_s)
                            all_us = sum(figures[f"{who}_us_per_token"] for who in ("router", "replica", "client"))
                            notes.add(f"{call}, {what}, {way}", **figures, all_us_per_token=all_us)


def _load(settings: Settings, call: str, what: str, way: str, trust: RigTrust) -> LeanLoad:
    output, is_secured = OUTPUTS[what], way == "secured"
    return LeanLoad(
        call=call,
        streams=STREAMS,
        output=output,
        prompt=PROMPT_TOKENS,
        duration_s=settings.seconds(2.5),
        warm_up_s=0.7,
        tells_time=False,
        is_staggered=output > 1,
        ca_file=trust.ca_file if is_secured else "",
        token=trust.token if is_secured else "",
    )


def _turn(number: int) -> tuple[str, ...]:
    """Return the ways in the order of this turn."""
    return WAYS if number % 2 == 0 else WAYS[::-1]


async def _latency(settings: Settings, notes: Notes, call: str, rigs: dict[str, RouterRig], trust: RigTrust) -> None:
    """Ask in turns of one; the first request of each way opens its stream and is not counted."""
    clients = {
        "clear": Client(call, rigs["clear"].address),
        "secured": Client(call, rigs["secured"].address, ca_file=trust.ca_file, token=trust.token),
    }
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    rng = random.Random(1)
    for client in clients.values():
        await client.first_token_s(_prompt(rng))
    for pair in range(10 if settings.is_quick else PAIRS):
        for way in _turn(pair):
            await asyncio.sleep(PAUSE_S)
            times[way].append(await clients[way].first_token_s(_prompt(rng)))
    for way, client in clients.items():
        notes.add(
            f"{call}, first token, {way}",
            sent=len(times[way]) + 1,
            ended=client.num_ended,
            p50_ms=1e3 * statistics.median(times[way]),
        )
        await client.close()


def _prompt(rng: random.Random) -> list[int]:
    return rng.choices(range(300, 1_000), k=PROMPT_TOKENS)


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for call in CALLS:
        for what in OUTPUTS:
            lost = _compared(notes, f"{call}, {what}", f"{what}_per_s", lambda clear, secured: 1 - secured / clear)
            taken = _compared(notes, f"{call}, {what}", "all_us_per_token", lambda clear, secured: 1 - clear / secured)
            detail = (
                f"{_both(notes, f'{call}, {what}', f'{what}_per_s')}; by CPU a token {figure(taken)}, µs: "
                + ", ".join(
                    f"{who} {_both(notes, f'{call}, {what}', f'{who}_us_per_token')}"
                    for who in ("router", "replica", "client")
                )
            )
            bars.append(at_most(f"{call}: share of {what}/s lost to TLS and keys", lost, MAX_LOSS, detail))
        added = _compared(notes, f"{call}, first token", "p50_ms", lambda clear, secured: secured - clear)
        detail = f"{_both(notes, f'{call}, first token', 'p50_ms')}, warm connection"
        bars.append(at_most(f"{call}: added to the first token by TLS and keys, p50, ms", added, MAX_ADDED_MS, detail))
    return bars


def _compared(notes: Notes, what: str, key: str, compare: Callable[[float, float], float]) -> float | None:
    """Return the median over the repetitions of what each one's pair compares to."""
    pairs = zip(notes.of(f"{what}, clear", key), notes.of(f"{what}, secured", key), strict=False)
    compared = [compare(clear, secured) for clear, secured in pairs if clear and secured]
    return statistics.median(compared) if compared else None


def _both(notes: Notes, what: str, key: str) -> str:
    clear, secured = (notes.median(f"{what}, {way}", key) for way in WAYS)
    return f"{figure(clear)} -> {figure(secured)}"


if __name__ == "__main__":
    sys.exit(main("trust_cost", measure, judge))
