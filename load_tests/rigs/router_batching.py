"""What the batcher is worth: the same requests with it and without it, in turns, in front of the same replicas.

Without it (`router.batching = false`) requests go one by one in the order of their arrival; placement is the same.
Capacity is what 64 users of a closed loop get without it. The replicas' caches hold a part of the sixteen prefixes, so
an order that keeps equal ones together computes fewer of them again. Misses of deadlines are requests that were taken
on and not answered in time; refused at once is not a miss, so the answers in time are judged beside it.
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
MIN_SAVING, MAX_WAIT_MS, MAX_MISSES = 1.3, 0.2, 0.5
MISSED = "DEADLINE_EXCEEDED"


async def measure(settings: Settings, notes: Notes) -> None:
    rate = await _capacity(settings, notes)
    for repetition in settings.rounds():
        for mode in MODES:
            changes = _changes(settings, repetition, {"arrivals.rate": 0.9 * rate})
            load = await _run(mode, changes)
            notes.add(f"0.9 x capacity, {mode}", **load.counts(), **_figures(load))
        for mode in MODES:
            changes = _changes(settings, repetition, {"arrivals.rate": 1.5 * rate}, timeout_s=[0.4, 2.0])
            load = await _run(mode, changes)
            notes.add(f"1.5 x capacity, {mode}", **load.counts(), **_figures(load), missed=_missed(load))
    for mode in MODES:
        slow = {"arrivals.rate": 1, "arrivals.duration_s": settings.seconds(15.0, 2.0), "arrivals.process": "constant"}
        load = await _run(mode, slow)
        notes.add(f"1 request/s, {mode}", **load.counts(), **_figures(load))


def _changes(settings: Settings, repetition: int, others: dict[str, Any], **kind: Any) -> dict[str, Any]:
    question = {"name": "question", "output": 8, "prompt": {"system": 512, "systems": 16, "own": 16}, **kind}
    return {
        "kinds": [question],
        "arrivals.duration_s": settings.seconds(10.0),
        "seed": repetition + 1,
        **others,
    }


async def _capacity(settings: Settings, notes: Notes) -> float:
    """Return how many requests a second are answered without the batcher when there are always enough of them."""
    arrivals = {"process": "closed", "concurrency": 64, "duration_s": settings.seconds(10.0)}
    load = await _run("off", {"arrivals": arrivals})
    rate = load.figures["requests_per_s"]
    assert rate is not None
    notes.add("capacity", **load.counts(), requests_per_s=rate)
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

    rate = figure(notes.median("capacity", "requests_per_s"), "requests/s")
    on, off, prefill = compared("0.9 x capacity", "prefill_tokens")
    first, first_off, times = compared("0.9 x capacity", "first_p99_ms")
    misses, misses_off, missed = compared("1.5 x capacity", "missed")
    answers, answers_off, answered = compared("1.5 x capacity", "in_time")
    wait, wait_off, waits = compared("1 request/s", "queue_p50_ms")
    longest = figure(notes.worst("1 request/s, on", "queue_max_ms"), "ms")
    return [
        at_least("batcher: prefill tokens, off / on", ratio(off, on), MIN_SAVING, f"{prefill}; capacity {rate}"),
        at_most("batcher: p99 first token, on / off", ratio(first, first_off), 1.0, f"{times} ms"),
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
