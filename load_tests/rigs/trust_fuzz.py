"""A million messages that nobody should send: no crash, no leak, no INTERNAL.

Over sockets: a router and a replica with the fake engine in a process of their own (`fuzz_server.py`) get, in rounds,
messages of `message_mutator.py` on every call of the public port (Generate, Session, ListModels, Tokenize, Detokenize,
GetStatus, health, reflection), from strangers and from a router that knows the secret on the data port, and from
replicas that know it on the router's links. The rest goes to what is behind the sockets, without them
(`fuzz_direct.py`), in a process for each core. Five to ten minutes.

How it is judged:
    messages        sent in all, and over sockets
    failures        statuses INTERNAL or UNKNOWN (but for an error that a hostile replica calls so), exceptions, errors
                    in a log, a stranger who was let in, a process that has ended; the runs have the bytes of the first
    good requests   after each round and each few thousand direct messages one is sent; its tokens must be right
    left            answers, entries, sessions, works, blocks and routers, once nothing is sent any more; and books that
                    do not agree (`check_integrity`)
    memory          of each process at its end, as a multiple of that after a third of the way: 1.1 at most
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from typing import Any, Final

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.fuzz_data import HostileReplica, HostileRouter
from load_tests.rigs.fuzz_public import OF_HOSTILE, PublicAttack, is_answered, open_channel
from load_tests.rigs.fuzz_samples import NUMBERS, TEXTS, of_kind
from load_tests.rigs.fuzz_server import ROOT, FuzzedServer
from load_tests.rigs.fuzz_tally import FuzzTally, what_is_left, worst_growth
from load_tests.rigs.message_mutator import Mutator
from workers.handshake import ClusterKeys

MESSAGES: Final = 1_000_000
OVER_SOCKETS: Final = 120_000
MAX_GROWTH: Final = 1.1
ROUNDS: Final = 9
SEED: Final = 20_261_122
SHARES: Final = {
    "unary": 0.07,
    "generate": 0.07,
    "watch": 0.02,
    "reflect": 0.06,
    "sessions": 0.28,
    "strangers": 0.03,
    "router": 0.27,
    "replicas": 0.20,
}
"""Of the messages over sockets."""
HOSTILE_REPLICAS: Final = 3
REPLICAS_S: Final = 20.0
"""How long hostile replicas may take for their part of a round."""
LEFT_S: Final = 12.0
"""An answer is kept for five seconds after its end."""
DIRECT_S: Final = 900.0
PROCESSES: Final = 2
SOCKETS, DIRECT = "over sockets", "without sockets"


async def measure(settings: Settings, notes: Notes) -> None:
    over_sockets = 2_500 if settings.is_quick else OVER_SOCKETS
    direct = 5_000 if settings.is_quick else MESSAGES - OVER_SOCKETS
    with FuzzedServer() as server:
        await _attack(server, over_sockets, 3 if settings.is_quick else ROUNDS, notes)
    await _attack_directly(direct, notes)


class _Round:
    """What is sent over sockets, in one round after the other."""

    def __init__(self, server: FuzzedServer, channels: Any, tally: FuzzTally) -> None:
        public, data_port = channels
        self._server = server
        self._tally = tally
        self._keys = ClusterKeys.derive(server.secret)
        self._mutator = Mutator(SEED, texts=TEXTS, numbers=NUMBERS)
        self._public = PublicAttack(public, self._mutator, of_kind(), tally)
        self._router = HostileRouter(data_port, self._keys, self._mutator, tally)

    async def send(self, number: int) -> None:
        parts = {name: round(number * share) for name, share in SHARES.items()}
        await self._public.call_unary(parts["unary"])
        await self._public.generate(parts["generate"])
        await self._public.watch(parts["watch"])
        await self._public.reflect(parts["reflect"])
        await self._public.hold_sessions(parts["sessions"])
        await self._router.knock(parts["strangers"])
        await self._router.attack(parts["router"])
        await self._be_replicas(parts["replicas"])

    async def _be_replicas(self, number: int) -> None:
        """Answer the router's works wrongly, until so many messages were sent."""
        replicas = [HostileReplica(f"bad-{i}", self._keys, self._mutator, self._tally) for i in range(HOSTILE_REPLICAS)]
        end, give_up = self._tally.num_messages + number, time.monotonic() + REPLICAS_S
        try:
            for replica in replicas:
                await replica.start()
            await self._server.set_replicas({replica.replica_id: replica.address for replica in replicas})
            while self._tally.num_messages < end and time.monotonic() < give_up:
                await self._public.generate(50, target=OF_HOSTILE)
        finally:
            if self._server.is_alive:
                await self._server.set_replicas({})
            await asyncio.gather(*(replica.stop() for replica in replicas))


async def _attack(server: FuzzedServer, num_messages: int, num_rounds: int, notes: Notes) -> None:
    tally, rng, began = FuzzTally(), random.Random(SEED), time.monotonic()
    memories: list[float] = []
    num_good = num_wrong = 0
    told: dict[str, Any] = {}
    async with open_channel(server.router) as public, open_channel(server.replica) as data_port:
        rounds = _Round(server, (public, data_port), tally)
        try:
            for _ in range(num_rounds):
                await rounds.send(num_messages // num_rounds)
                wrong = await is_answered(public, rng)
                num_good += 1
                num_wrong += bool(wrong)
                if wrong:
                    tally.failed("good request", "was not answered", [], wrong)
                told = await server.tell()
                memories.append(told["memory_mib"])
                if told["integrity"]:
                    tally.failed("books", told["integrity"], [])
            told = await _nothing_left(server)
            memories.append(told["memory_mib"])
        except (RuntimeError, OSError) as error:
            tally.failed("process", "has ended", [], repr(error))
    for text in told.get("errors", ()):
        tally.failed("log", "an error was logged", [], text)
    notes.add(
        SOCKETS,
        wall_s=round(time.monotonic() - began, 1),
        **tally.to_dict(),
        good=num_good,
        wrong=num_wrong,
        left=_left(told),
        memories=[memories],
    )


async def _nothing_left(server: FuzzedServer) -> dict[str, Any]:
    """Return what the server tells once nothing is left, or after `LEFT_S`."""
    give_up = time.monotonic() + LEFT_S
    while True:
        told = await server.tell()
        if not _left(told) or time.monotonic() > give_up:
            return told
        await asyncio.sleep(0.2)


def _left(told: dict[str, Any]) -> str:
    """Return in words what should not be there; that nothing was told is one of these."""
    if not told:
        return "nothing was told"
    return ", ".join(text for text in (what_is_left(told["left"]), told["integrity"], told["failure"]) if text)


async def _attack_directly(num_messages: int, notes: Notes) -> None:
    began = time.monotonic()
    results = await asyncio.gather(*(_direct(SEED + i, num_messages // PROCESSES) for i in range(PROCESSES)))
    tally, memories = FuzzTally(), []
    for result in results:
        if result is None:
            tally.failed("process", "has ended", [], "it says above why")
        else:
            tally.add(result)
            memories.append(result["memories"])
    notes.add(DIRECT, wall_s=round(time.monotonic() - began, 1), **tally.to_dict(), memories=memories)


async def _direct(seed: int, num_messages: int) -> dict[str, Any] | None:
    """Return what a process with this part of the messages tells; None if it does not."""
    job = json.dumps({"seed": seed, "messages": num_messages})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "load_tests.rigs.fuzz_direct", job, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    try:
        async with asyncio.timeout(DIRECT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        return None
    told: dict[str, Any] = json.loads(output)
    return told


def judge(notes: Notes) -> list[Bar]:
    sent = {what: notes.total(what, "messages") for what in (SOCKETS, DIRECT)}
    failures = [notes.total(what, "num_failures") for what in sent]
    memories = [each for what in sent for run in notes.of(what, "memories") for each in run]
    lefts = notes.of(SOCKETS, "left")
    detail = "; ".join(
        f"{failure['target']}: {failure['what']}"
        for what in sent
        for each in notes.of(what, "failures")
        for failure in each
    )
    is_whole = None not in sent.values()
    return [
        at_least("fuzz: messages", sum(number or 0 for number in sent.values()), MESSAGES),
        at_least("fuzz: messages over sockets", sent[SOCKETS], 100_000),
        at_most(
            "fuzz: crashes, INTERNAL, UNKNOWN, errors in logs",
            sum(number or 0 for number in failures) if is_whole else None,
            0,
            detail[:500],
        ),
        at_most("fuzz: good requests not answered", notes.total(SOCKETS, "wrong"), 0),
        at_most(
            "fuzz: runs after which something is left", sum(map(bool, lefts)) if lefts else None, 0, "; ".join(lefts)
        ),
        at_most("fuzz: memory at the end / at a third", worst_growth(memories) if is_whole else None, MAX_GROWTH),
    ]


if __name__ == "__main__":
    sys.exit(main("trust_fuzz", measure, judge))
