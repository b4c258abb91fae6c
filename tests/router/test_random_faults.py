"""Whatever happens in whatever order, every request ends exactly once, and what was delivered is true."""

from __future__ import annotations

import asyncio
import random

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration

from tests.router.rig import ClientSession, Outcome, Rig, Work, read_generate, running, text_request
from workers.errors import CancelledRequestError, DeadlineError, OctavoError, UnavailableError

TEXT = "The quick brown 여우 jumps 🙂 over the lazy dog."
TOKENS = list(TEXT.encode())
ENDS: list[OctavoError] = [
    UnavailableError("lost"),
    DeadlineError("late"),
    CancelledRequestError("gone"),
    OctavoError("?"),
]


async def play(work: Work, rng: random.Random) -> None:
    """Answer with `TEXT`, or with some of it and an error."""
    work.dispatch()
    cut = rng.choice([None, None, rng.randrange(len(TOKENS))])
    position = 0
    while position < len(TOKENS) and not work.is_over:
        if cut is not None and position >= cut:
            work.end(rng.choice(ENDS))
            return
        step = rng.randrange(1, 6)
        work.emit(TOKENS[position : position + step])
        position += step
        if rng.random() < 0.5:
            await asyncio.sleep(rng.random() * 0.004)
    work.finish()


def check(outcome: Outcome, *, is_cancelled: bool = False) -> None:
    """`is_cancelled`: the client wanted no more; of an answer that had ended then, only the terminal may have come."""
    assert outcome.token_ids == TOKENS[: len(outcome.token_ids)]
    if outcome.code is grpc.StatusCode.OK:
        assert is_cancelled or (outcome.text == TEXT and outcome.finish is not None)
    else:
        assert outcome.reason or outcome.code in (grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED)


async def over_generate(rig: Rig, rng: random.Random) -> None:
    fault = rng.choice(["none", "cancel", "deadline"])
    call = rig.stub.Generate(text_request(), timeout=0.02 if fault == "deadline" else 10)
    if fault == "cancel":
        await asyncio.sleep(rng.random() * 0.03)
        call.cancel()
        return
    check(await read_generate(call))


async def over_session(rig: Rig, rng: random.Random, number: int) -> None:
    """Some requests on a stream that breaks again and again, each attached again until it has its terminal."""
    ids = [f"{number}-{i}" for i in range(4)]
    outcomes = {name: Outcome(grpc.StatusCode.UNKNOWN, num_terminals=0) for name in ids}
    cancelled: set[str] = set()
    is_first = True
    while not all(outcome.num_terminals for outcome in outcomes.values()):
        async with rig.open_session() as session:
            session.outcomes = outcomes
            for name, outcome in outcomes.items():
                if outcome.num_terminals:
                    continue
                window = rng.choice([None, 3])
                timeout = Duration(nanos=20_000_000) if rng.random() < 0.2 else None
                offsets = [] if is_first else [len(outcome.token_ids)]
                await session.start(name, text_request(), attach_offsets=offsets, window=window, timeout=timeout)
            is_first = False
            await live(session, ids, rng, cancelled)
    for name, outcome in outcomes.items():
        assert outcome.num_terminals == 1
        if outcome.reason not in ("REQUEST_NOT_FOUND", "REQUEST_ID_IN_USE"):
            check(outcome, is_cancelled=name in cancelled)


async def live(session: ClientSession, ids: list[str], rng: random.Random, cancelled: set[str]) -> None:
    """Read, grant and cancel for a while; then leave without a word."""
    for _ in range(rng.randrange(3, 20)):
        if all(session.known(name).num_terminals for name in ids):
            return
        for name in ids:
            await session.grant(name, 5)
        if rng.random() < 0.05:
            name = rng.choice(ids)
            cancelled.add(name)
            await session.cancel(name)
        try:
            async with asyncio.timeout(0.05):
                await session.read()
        except TimeoutError:
            return  # a read that was given up has eaten a message, as a broken stream does


@pytest.mark.parametrize("seed", range(3))
async def test_everything_ends_once(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    rng = random.Random(seed)
    players: list[asyncio.Task[None]] = []
    async with running(session_grace_s=2.0, slow_consumer_s=5.0) as rig:
        rig.backend.script = lambda work: players.append(asyncio.create_task(play(work, rng)))
        clients = [over_generate(rig, rng) for _ in range(60)] + [over_session(rig, rng, i) for i in range(12)]
        await asyncio.gather(*clients)
        await asyncio.gather(*players)
        await rig.assert_nothing_left()
    assert rig.server.sessions.num_known == 0
    assert "Traceback" not in caplog.text
