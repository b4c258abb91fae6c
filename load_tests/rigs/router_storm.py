"""A storm of cancels: ten thousand requests in bursts, half of them cancelled at random moments, over both calls.

Afterwards the router must have nothing queued or running, its replicas nothing running and every block free, within a
second of the last terminal; and the router must have ended as many requests as it accepted.
"""

from __future__ import annotations

import sys

from load_tests.bars import Bar, at_least, at_most
from load_tests.notes import Notes
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import IDLE_S, send
from load_tests.rigs.router_rig import RigConfig, RouterRig

REQUESTS = 10_000
RATE = 250
MAX_IDLE_S = 1.0
CALLS = ("session", "generate")


async def measure(settings: Settings, notes: Notes) -> None:
    number = 200 if settings.is_quick else REQUESTS // len(CALLS)
    for call in CALLS:
        with RouterRig(RigConfig(replicas=2, step_s=0.012, num_sequences=128, num_blocks=2_048)) as rig:
            changes = {
                "call.kind": call,
                "arrivals.rate": RATE,
                "arrivals.duration_s": 2.0 * number / RATE,
                "limits.requests": number,
            }
            load = await send(rig, "cancel_storm", changes)
            notes.add(f"storm, {call}", **load.counts(), cancelled=load.report.tally.all.cancelled)


def judge(notes: Notes) -> list[Bar]:
    bars = []
    for call in CALLS:
        what = f"storm, {call}"
        sent, cancelled = notes.total(what, "sent"), notes.total(what, "cancelled")
        runs = len(notes.of(what, "sent"))
        idle = notes.of(what, "idle_s")
        slowest = max(idle) if runs and len(idle) == runs else None
        detail = f"{sent} requests, {cancelled} cancelled; None: not within {IDLE_S:g} s"
        failed = [sum(errors.values()) for errors in notes.of(what, "errors")]
        bars += [
            at_most(f"storm, {call}: s until nothing is left", slowest, MAX_IDLE_S, detail),
            at_most(f"storm, {call}: failed otherwise", sum(failed) if failed else None, 0),
        ]
    total = sum(notes.total(f"storm, {call}", "sent") or 0 for call in CALLS)
    return [*bars, at_least("storm: requests", total, REQUESTS)]


if __name__ == "__main__":
    sys.exit(main("router_storm", measure, judge))
