"""How fast tokens and requests go through a router, and what they cost it, over Session and over Generate.

Paced: 64 streams, tokens made at a little more than the rate of the bar, each saying when it was made; what counts is
how old tokens are when the client has them, and how many it has a second. A system that cannot keep up with what it is
offered has tokens of any age, which says nothing of it: then the rate is stepped down and up to the largest at which
tokens are young enough, and that rate is the bar's figure. One-token requests: 64 at a time, as many as are answered,
by an engine with the steps of the paced run at the bar's rate (2 and 4.8 ms). Router, replica and client
(`lean_client.py`) are processes of their own on the same cores; what each one takes is noted. Detokenisation, accounts
and two stop strings are on, as for any request.
"""

from __future__ import annotations

import sys
from typing import Any

from load_tests.bars import Bar, at_least, at_most
from load_tests.generator.search import search_max_rate
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.lean_client import DRAIN_S
from load_tests.rigs.lean_crew import LeanLoad, load, summary
from load_tests.rigs.router_rig import RigConfig, RouterRig

STREAMS = 64
CALLS = ("session", "generate")
TOKENS_PER_S = {"session": 30_000, "generate": 13_000}
REQUESTS_PER_S = {"session": 2_000, "generate": 1_000}
ROUTER_US = {"session": 25.0, "generate": 60.0}
MAX_AGE_MS = 20.0
MARGIN = {"session": 1.08, "generate": 1.03}
"""Tokens are made so much faster than the bar asks for: where streams end and begin, a few steps are not full. Over
Session a stream ends after two seconds, over Generate after five."""
MAX_OUTPUT = 1_024
ANSWER_S = DRAIN_S / 2
"""How long an answer takes at most."""
SEARCH_S = 4.0
SEARCH_FROM = 0.85
"""Of the rate that came through when too much was offered."""
SEARCH_PRECISION = 0.1
SEARCH_TRIALS = 7
"""Those that need no run, since the rate is above what was offered first, are counted, too."""
NOTHING_IN_TIME = {"tokens_per_s": 0.0, "age_p50_ms": None, "age_p99_ms": None}


async def measure(settings: Settings, notes: Notes) -> None:
    for _ in settings.rounds():
        for call in CALLS:
            await _paced(settings, notes, call)
            await _one_token(settings, notes, call)


async def _paced(settings: Settings, notes: Notes, call: str) -> None:
    """Measure at the rate of the bar; if tokens are too old then, search for the largest rate at which they are not."""
    whole = TOKENS_PER_S[call]
    run = await _at(settings, call, whole, settings.seconds(8.0, 2.0))
    notes.add(f"{call}, paced", **run)
    best = run if _is_in_time(run) else NOTHING_IN_TIME

    async def is_in_time(rate: float) -> bool:
        nonlocal best
        if rate >= whole:
            return False
        run = await _at(settings, call, rate, SEARCH_S)
        notes.add(f"{call}, searching", **run)
        if _is_in_time(run) and run["tokens_per_s"] > best["tokens_per_s"]:
            best = run
        return _is_in_time(run)

    if not _is_in_time(run) and not settings.is_quick:
        start = SEARCH_FROM * min(whole, run["tokens_per_s"])
        await search_max_rate(is_in_time, start=start, precision=SEARCH_PRECISION, max_trials=SEARCH_TRIALS)
    notes.add(f"{call}, in time", **{figure: best[figure] for figure in NOTHING_IN_TIME})


async def _at(settings: Settings, call: str, rate: float, seconds: float) -> dict[str, Any]:
    config = RigConfig(
        step_s=step_s(call, rate),
        num_sequences=STREAMS,
        num_blocks=16_384,
        chunk_tokens=512,
        tells_time=True,
    )
    with RouterRig(config) as rig:
        paced = LeanLoad(call=call, output=output_at(rate), duration_s=seconds, is_staggered=True)
        counts, cpu_s = await load(rig, paced)
        return {"offered_per_s": rate, **summary(counts, cpu_s)}


def step_s(call: str, rate: float) -> float:
    """Return how long a step takes of an engine that makes a little more than `rate` tokens a second."""
    return STREAMS / (MARGIN[call] * rate)


def output_at(rate: float) -> int:
    """Return how long answers are at a rate of tokens: as long as they may be, and over well before clients give up."""
    return max(1, min(MAX_OUTPUT, int(ANSWER_S * rate / STREAMS)))


def _is_in_time(run: dict[str, Any]) -> bool:
    return run["age_p99_ms"] is not None and run["age_p99_ms"] <= MAX_AGE_MS


async def _one_token(settings: Settings, notes: Notes, call: str) -> None:
    config = RigConfig(
        step_s=step_s(call, TOKENS_PER_S[call]), num_sequences=STREAMS, chunk_tokens=1_024, num_blocks=16_384
    )
    with RouterRig(config) as rig:
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
        in_time = f"{call}, in time"
        rate = notes.median(in_time, "tokens_per_s")
        beside = (
            f"at {figure(notes.median(paced, 'tokens_per_s'), 'tokens/s')}, "
            f"{figure(notes.median(paced, 'tokens_a_message'))} a message; "
            f"p50 {figure(notes.median(paced, 'age_p50_ms'), 'ms')}"
        )
        there = f"p99 {figure(notes.median(in_time, 'age_p99_ms'), 'ms')} there; "
        costs = "µs a token: " + ", ".join(
            f"{who} {figure(notes.median(paced, f'{who}_us_per_token'))}" for who in ("router", "replica", "client")
        )
        bars += [
            at_least(f"{call}: tokens/s, 64 streams, in time", rate, TOKENS_PER_S[call], there + costs),
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
