"""Placement by what is cached, beside four usual ways that do not look: the same requests, the same replicas.

Eight prefixes of 512 tokens over four replicas, each of which can keep three of them and what it runs. The best
possible computes each prefix once. Then bursts: 32 requests at once with a prefix that nobody has, to be computed once.
"""

from __future__ import annotations

import asyncio
import random
import sys

from octavo.client import Client

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import in_ms, send
from load_tests.rigs.router_policies import POLICIES
from load_tests.rigs.router_rig import RigConfig, RouterRig

OURS = "ours"
REPLICAS, PREFIXES, PREFIX_TOKENS, OWN_TOKENS = 4, 8, 512, 16
RATE = 60
BURST = 32
MIN_SHARE, MAX_BALANCE = 0.95, 1.25
BLOCK = 16


async def measure(settings: Settings, notes: Notes) -> None:
    for repetition in settings.rounds(2):
        for policy in (OURS, *POLICIES):
            config = RigConfig(
                replicas=REPLICAS,
                step_s=0.005,
                num_blocks=128,
                block_size=BLOCK,
                placement="" if policy == OURS else policy,
            )
            changes = {
                "arrivals.rate": RATE,
                "arrivals.duration_s": settings.seconds(12.0, 2.0),
                "seed": repetition + 1,
            }
            with RouterRig(config) as rig:
                load = await send(rig, "router_prefixes", changes)
            tally = load.report.tally
            notes.add(
                policy,
                **load.counts(),
                cached_share=load.figures["cached_share"],
                of_best=ratio(load.figures["cached_share"], best_share(tally.prompt_tokens)),
                balance=load.figures["balance"],
                first_p99_ms=in_ms(load.figures["first_token_s.p99"]),
            )
    with RouterRig(RigConfig(replicas=REPLICAS, step_s=0.005)) as rig:
        for number in range(3):
            await _burst(rig, number, notes)


def best_share(prompt_tokens: int) -> float | None:
    """Return the largest share of the prompt tokens sent that could be cached: all of the prefixes but the first of
    each."""
    length = PREFIX_TOKENS + OWN_TOKENS
    return ratio((prompt_tokens // length - PREFIXES) * PREFIX_TOKENS, prompt_tokens)


async def _burst(rig: RouterRig, number: int, notes: Notes) -> None:
    rng = random.Random(f"burst {number}")
    prefix = rng.choices(range(300, 1_000), k=PREFIX_TOKENS)

    async def ask(client: Client) -> tuple[int, str]:
        own = rng.choices(range(300, 1_000), k=OWN_TOKENS)
        call = client.generate([*prefix, *own], max_tokens=8, ignore_eos=True)
        async for _ in call:
            pass
        assert call.usage is not None
        return PREFIX_TOKENS - min(call.usage.cached_tokens, PREFIX_TOKENS), call.usage.replica

    async with Client(rig.address) as client:
        answers = await asyncio.gather(*(ask(client) for _ in range(BURST)))
    computed = sum(tokens for tokens, _ in answers)
    replicas = len({replica for _, replica in answers})
    notes.add("burst", sent=BURST, ended=len(answers), times=computed / PREFIX_TOKENS, replicas=replicas)


def judge(notes: Notes) -> list[Bar]:
    shares = {policy: notes.median(policy, "of_best") for policy in (OURS, *POLICIES)}
    balances = {policy: notes.median(policy, "balance") for policy in (OURS, *POLICIES)}
    replicas = notes.of("burst", "replicas")
    return [
        at_least("prefixes: cached share, of the best possible", shares[OURS], MIN_SHARE, _beside(shares)),
        at_most("prefixes: most loaded / mean, in tokens", balances[OURS], MAX_BALANCE, _beside(balances)),
        at_most(
            "prefixes: times a burst's new prefix is computed",
            notes.worst("burst", "times"),
            1.0,
            f"{BURST} requests at once, {len(replicas)} times, on {replicas} replicas",
        ),
    ]


def _beside(figures: dict[str, float | None]) -> str:
    return ", ".join(f"{policy} {figure(value)}" for policy, value in figures.items() if policy != OURS)


if __name__ == "__main__":
    sys.exit(main("router_prefixes", measure, judge))
