"""What the batcher is worth: the same requests with it and without it, in turns, in front of the same replicas.

Sixteen prefixes of 512 tokens are 512 blocks of 16, and so are the caches of the two replicas together: with the own
blocks of what runs they do not fit, and placement alone, which is the same on both sides, cannot help that prefixes
drive each other out. Without the batcher (`router.batching = false`) requests go one by one in the order of their
arrival; with it those go first whose prefix a replica has.

Capacity is what 64 users of a closed loop get, of the router as it is used, with the batcher. At 0.9 of it there is
about as much of a queue as a busy cluster has, and without the batcher, which can answer half of that, it has no end:
that says what the batcher is worth, and of first tokens nothing. So these are judged a second time at 0.9 x what can be
answered without it, where little waits and little is to be had from order.

Misses of deadlines, at 1.5 x what can be answered without it, are requests that were taken on and not answered in time;
refused at once is not a miss, so the answers in time are judged beside it. (While deadlines press, order is theirs and
not that of the caches: at 1.5 x the capacity with it the batcher answers half as much again as without, and no more.)
"""

from __future__ import annotations

import sys
from typing import Any

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes, difference, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import Load, in_ms, send
from load_tests.rigs.router_rig import RigConfig, RouterRig

MODES = {"on": True, "off": False}
SCENARIO = "router_batching"
NORMAL, PLAIN = "0.9 x capacity", "0.9 x capacity without it"
MIN_SAVING, MAX_WAIT_MS, MAX_MISSES = 1.3, 0.2, 0.5
MISSED = "DEADLINE_EXCEEDED"


async def measure(settings: Settings, notes: Notes) -> None:
    rate, plain = [await _capacity(mode, settings, notes) for mode in MODES]
    for repetition in settings.rounds():
        for what, offered in ((NORMAL, 0.9 * rate), (PLAIN, 0.9 * plain)):
            for mode in MODES:
                load = await _run(mode, _changes(settings, repetition, {"arrivals.rate": offered}))
                notes.add(f"{what}, {mode}", **load.counts(), **_figures(load))
        for mode in MODES:
            changes = _changes(settings, repetition, {"arrivals.rate": 1.5 * plain}, timeout_s=[0.4, 2.0])
            load = await _run(mode, changes)
            notes.add(f"1.5 x capacity without it, {mode}", **load.counts(), **_figures(load), missed=_missed(load))
    for mode in MODES:
        slow = {"arrivals.rate": 1, "arrivals.duration_s": settings.seconds(15.0, 2.0), "arrivals.process": "constant"}
        load = await _run(mode, slow)
        notes.add(f"1 request/s, {mode}", **load.counts(), **_figures(load))


def _changes(settings: Settings, repetition: int, others: dict[str, Any], **kind: Any) -> dict[str, Any]:
    question = {"name": "question", "output": 8, "prompt": {"system": 512, "systems": 16, "own": 16}, **kind}
    return {
        "kinds": [question],
        "arrivals.duration_s": settings.seconds(8.0),
        "seed": repetition + 1,
        **others,
    }


async def _capacity(mode: str, settings: Settings, notes: Notes) -> float:
    """Return how many requests a second are answered when there are always enough of them."""
    arrivals = {"process": "closed", "concurrency": 64, "duration_s": settings.seconds(8.0)}
    load = await _run(mode, {"arrivals": arrivals})
    rate = load.figures["requests_per_s"]
    assert rate is not None
    notes.add(f"capacity, {mode}", **load.counts(), requests_per_s=rate)
    return rate


async def _run(mode: str, changes: dict[str, Any]) -> Load:
    config = RigConfig(
        replicas=2, step_s=0.02, num_sequences=16, num_blocks=256, tells_time=True, router={"batching": MODES[mode]}
    )
    with RouterRig(config) as rig:
        return await send(rig, SCENARIO, changes)


def _figures(load: Load) -> dict[str, Any]:
    figures = load.figures
    return {
        "prefill_tokens": figures["computed_prompt_tokens"],
        "cached_share": figures["cached_share"],
        "first_p99_ms": in_ms(figures["first_token_s.p99"]),
        "queue_p50_ms": in_ms(figures["queue_s.p50"]),
        "queue_max_ms": in_ms(figures["queue_s.max"]),
        "in_time": load.report.tally.all.good,
    }


def _missed(load: Load) -> int:
    tally = load.report.tally
    return tally.late + sum(count for reason, count in tally.errors.items() if reason.startswith(MISSED))


def judge(notes: Notes) -> list[Bar]:
    def compared(load: str, key: str) -> tuple[float | None, float | None, str]:
        on, off = notes.median(f"{load}, on", key), notes.median(f"{load}, off", key)
        return on, off, f"on {figure(on)}, off {figure(off)}"

    rates = " and ".join(figure(notes.median(f"capacity, {mode}", "requests_per_s")) for mode in MODES)
    on, off, prefill = compared(NORMAL, "prefill_tokens")
    first, first_off, times = compared(NORMAL, "first_p99_ms")
    on_plain, off_plain, _ = compared(PLAIN, "prefill_tokens")
    first_plain, first_off_plain, times_plain = compared(PLAIN, "first_p99_ms")
    misses, misses_off, missed = compared("1.5 x capacity without it", "missed")
    answers, answers_off, answered = compared("1.5 x capacity without it", "in_time")
    wait, wait_off, waits = compared("1 request/s", "queue_p50_ms")
    longest = figure(notes.worst("1 request/s, on", "queue_max_ms"), "ms")
    saved = f"{prefill}; capacity {rates} requests/s; x {figure(ratio(off_plain, on_plain))} at 0.9 of the latter"
    return [
        at_least("batcher: prefill tokens, off / on", ratio(off, on), MIN_SAVING, saved),
        at_most("batcher: p99 first token, on / off", ratio(first, first_off), 1.0, f"{times} ms"),
        at_most(
            "batcher: p99 first token, on / off, at 0.9 x capacity without it",
            ratio(first_plain, first_off_plain),
            1.0,
            f"{times_plain} ms",
        ),
        at_most(
            "batcher: added wait at 1 request/s, ms",
            difference(wait, wait_off),
            MAX_WAIT_MS,
            f"medians from acceptance to dispatch, {waits} ms; on at most {longest}",
        ),
        at_most("batcher: deadlines missed at 1.5 x load, on / off", ratio(misses, misses_off), MAX_MISSES, missed),
        at_least("batcher: answers in time at 1.5 x load, on / off", ratio(answers, answers_off), 1.0, answered),
    ]


if __name__ == "__main__":
    sys.exit(main("router_batching", measure, judge))
