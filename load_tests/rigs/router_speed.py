"""How fast tokens and requests go through a router, and what they cost it, over Session and over Generate.

Paced: 64 streams, tokens made at a little more than the rate of the bar, each saying when it was made; what counts is
how old tokens are when the client has them, and how many it has a second. One-token requests: 64 at a time, as many as
are answered. Router, replica and client (`lean_client.py`) are processes of their own on the same cores; what each one
takes is noted. Detokenisation, accounts and two stop strings are on, as for any request.
"""

from __future__ import annotations

import sys

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.lean_crew import LeanLoad, load, summary
from load_tests.rigs.router_rig import RigConfig, RouterRig

STREAMS = 64
CALLS = ("session", "generate")
TOKENS_PER_S = {"session": 30_000, "generate": 13_000}
REQUESTS_PER_S = {"session": 2_000, "generate": 1_000}
ROUTER_US = {"session": 25.0, "generate": 60.0}
MAX_AGE_MS = 20.0
MARGIN = 1.03
"""Tokens are made so much faster than the bar asks for: where streams end and begin, a few steps are not full."""


async def measure(settings: Settings, notes: Notes) -> None:
    for _ in settings.rounds():
        for call in CALLS:
            await _paced(settings, notes, call)
            await _one_token(settings, notes, call)


async def _paced(settings: Settings, notes: Notes, call: str) -> None:
    config = RigConfig(
        step_s=STREAMS / (MARGIN * TOKENS_PER_S[call]),
        num_sequences=STREAMS,
        num_blocks=16_384,
        chunk_tokens=512,
        tells_time=True,
    )
    with RouterRig(config) as rig:
        counts, cpu_s = await load(rig, LeanLoad(call=call, output=1_024, duration_s=settings.seconds(8.0, 2.0)))
        notes.add(f"{call}, paced", **summary(counts, cpu_s))


async def _one_token(settings: Settings, notes: Notes, call: str) -> None:
    with RouterRig(RigConfig(step_s=0.001, num_sequences=STREAMS, chunk_tokens=1_024, num_blocks=16_384)) as rig:
        small = LeanLoad(
            call=call, output=1, prompt=16, duration_s=settings.seconds(5.0), warm_up_s=0.5, tells_time=False
        )
        counts, cpu_s = await load(rig, small)
        notes.add(f"{call}, one token", **summary(counts, cpu_s))


def judge(notes: Notes) -> list[Bar]:
    """Return the bars; every figure is the median of the repetitions."""
    bars = []
    for call in CALLS:
        paced, single = f"{call}, paced", f"{call}, one token"
        rate = notes.median(paced, "tokens_per_s")
        beside = (
            f"at {figure(rate, 'tokens/s')}, {figure(notes.median(paced, 'tokens_a_message'))} a message; "
            f"p50 {figure(notes.median(paced, 'age_p50_ms'), 'ms')}"
        )
        costs = "µs a token: " + ", ".join(
            f"{who} {figure(notes.median(paced, f'{who}_us_per_token'))}" for who in ("router", "replica", "client")
        )
        bars += [
            at_least(f"{call}: tokens/s, 64 streams", rate, TOKENS_PER_S[call], costs),
            at_most(f"{call}: p99 age of a token, ms", notes.median(paced, "age_p99_ms"), MAX_AGE_MS, beside),
            at_most(
                f"{call}: CPU of the router, µs a token", notes.median(paced, "router_us_per_token"), ROUTER_US[call]
            ),
            at_least(
                f"{call}: one-token requests/s",
                notes.median(single, "requests_per_s"),
                REQUESTS_PER_S[call],
                "µs a request: "
                + ", ".join(
                    f"{who} {figure(notes.median(single, f'{who}_us_per_token'))}"
                    for who in ("router", "replica", "client")
                ),
            ),
        ]
    return bars


if __name__ == "__main__":
    sys.exit(main("router_speed", measure, judge))
