"""Placement with a real model: `octavo serve`, two replicas, shared prefixes; then caches emptied behind the router.

The second part asks with a prefix that one replica has, makes that replica forget it without telling (`cache_emptier`),
waits, and asks again: the router has noticed if it no longer expects there what is not there. Several waits.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from octavo.client import Client

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, ratio
from load_tests.rigs.attached_process import AttachedProcess, attached
from load_tests.rigs.bar_command import Settings, main
from load_tests.server import ServerProcess

REPLICAS, PREFIXES, PREFIX_TOKENS, OWN_TOKENS, OUTPUT = 2, 4, 256, 16, 4
REQUESTS, AT_ONCE = 48, 4
WAITS_S = (0.5, 1.0, 1.5, 1.9)
MAX_NOTICE_S, MIN_SHARE = 2.0, 0.95
START_S = 900.0
"""The model may have to be fetched and packed first."""


async def measure(settings: Settings, notes: Notes) -> None:
    command = ("cluster.cli", "serve", "--port", "0", "--replicas", str(REPLICAS))
    variables = {"RAY_AUTH_MODE": "disabled", "OCTAVO_ENGINE__THREADS": "1"}
    with tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder:
        process = ServerProcess([sys.executable, "-m", *command], variables, Path(folder) / "log")
        try:
            ready = json.loads(process.await_line("{", START_S))
            async with Client(ready["address"]) as client:
                await _share(client, settings, notes)
                with attached("load_tests.rigs.cache_emptier", ready["ray_address"], variables) as emptier:
                    for _ in settings.rounds(2):
                        for wait_s in WAITS_S:
                            await _forget(client, emptier, wait_s, notes)
        finally:
            process.stop()


async def _share(client: Client, settings: Settings, notes: Notes) -> None:
    """Ask with a few prefixes, some at once; note what was cached and who computed how much."""
    rng = random.Random(1)
    prefixes = [_tokens(rng, PREFIX_TOKENS) for _ in range(PREFIXES)]
    number = REQUESTS // 4 if settings.is_quick else REQUESTS
    prompts = [[*prefixes[i % PREFIXES], *_tokens(rng, OWN_TOKENS)] for i in range(number)]
    slots = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: Sequence[int]) -> tuple[int, int, str]:
        async with slots:
            return await _ask(client, prompt)

    # One of each first, as in a burst of new prefixes nothing of the rest could be cached yet.
    answers = await asyncio.gather(*map(one, prompts[:PREFIXES]))
    answers += await asyncio.gather(*map(one, prompts[PREFIXES:]))
    cached = sum(cached for cached, _, _ in answers)
    loads = Counter[str]()
    for tokens, _, replica in answers:
        loads[replica] += PREFIX_TOKENS + OWN_TOKENS - tokens + OUTPUT
    notes.add(
        "model",
        sent=number,
        ended=len(answers),
        of_best=ratio(cached, (number - PREFIXES) * PREFIX_TOKENS),
        balance=max(loads.values()) * REPLICAS / sum(loads.values()),
    )


async def _forget(client: Client, emptier: AttachedProcess, wait_s: float, notes: Notes) -> None:
    rng = random.Random()
    prefix = _tokens(rng, PREFIX_TOKENS)

    async def ask() -> tuple[int, int, str]:
        return await _ask(client, [*prefix, *_tokens(rng, OWN_TOKENS)])

    await ask()
    cached, _, replica = await ask()
    pids = {each.id: each.pid for each in (await client.status()).replicas}
    forgotten = await asyncio.to_thread(emptier.ask, pids[replica])
    await asyncio.sleep(wait_s)
    found, expected, asked = await ask()
    notes.add(
        "emptied",
        sent=3,
        ended=3,
        wait_s=wait_s,
        cached_before=cached,
        forgotten=forgotten,
        found=found,
        expected=expected,
        is_noticed=bool(cached and forgotten) and (asked != replica or expected <= found),
    )


async def _ask(client: Client, prompt: Sequence[int]) -> tuple[int, int, str]:
    """Return the cached tokens, those that the router expected, and the replica."""
    call = client.generate(prompt, max_tokens=OUTPUT, ignore_eos=True)
    async for _ in call:
        pass
    assert call.usage is not None
    assert call.decision is not None
    return call.usage.cached_tokens, call.decision.matched_tokens, call.usage.replica


def _tokens(rng: random.Random, number: int) -> list[int]:
    return rng.choices(range(300, 1_000), k=number)


def noticed_within(waits: Sequence[float], is_noticed: Sequence[bool]) -> float | None:
    """Return the shortest wait from which on every emptied cache had been noticed; None if not after the longest."""
    late = max((wait for wait, noticed in zip(waits, is_noticed, strict=True) if not noticed), default=0.0)
    return min((wait for wait in waits if wait > late), default=None)


def judge(notes: Notes) -> list[Bar]:
    noticed = notes.of("emptied", "is_noticed")
    return [
        at_least("real model: cached share, of the best possible", notes.median("model", "of_best"), MIN_SHARE),
        at_most("real model: most loaded / mean, in tokens", notes.median("model", "balance"), 1.25),
        at_most(
            "real model: s until an emptied cache is noticed",
            noticed_within(notes.of("emptied", "wait_s"), noticed),
            MAX_NOTICE_S,
            f"{sum(noticed)} of {len(noticed)} had been, after waits of {', '.join(map(str, WAITS_S))} s",
        ),
    ]


if __name__ == "__main__":
    sys.exit(main("router_with_model", measure, judge))
