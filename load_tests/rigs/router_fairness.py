"""One tenant who sends twenty times its share, beside four who stay at 60 % of theirs: what it costs these four.

A fake replica of 200 requests a second, five tenants. Runs with and without the greedy one alternate; what counts is by
how much the four's p99, from when a request was due to the end of its answer, is longer with it.
"""

from __future__ import annotations

import sys
from typing import Any

from load_tests.bars import Bar, at_most
from load_tests.generator.scenario import read_scenario
from load_tests.notes import Notes, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.rig_load import Load, in_ms, send
from load_tests.rigs.router_rig import RigConfig, RouterRig

CAPACITY = 200
MAX_MOVE = 1.2
SCENARIO = "router_fairness"
TENANT_HEADER = "x-octavo-tenant"


async def measure(settings: Settings, notes: Notes) -> None:
    config = RigConfig(step_s=0.04, num_sequences=64, tells_time=True, router={"tenant_header": TENANT_HEADER})
    table, _ = read_scenario(SCENARIO)
    modest, greedy = table["kinds"]
    for repetition in settings.rounds():
        for what, kinds in (("calm", [modest]), ("greedy", [modest, greedy])):
            changes = {
                "kinds": kinds,
                "arrivals.rate": sum(kind["weight"] for kind in kinds),
                "arrivals.duration_s": settings.seconds(10.0),
                "seed": repetition + 1,
            }
            with RouterRig(config) as rig:
                load = await send(rig, SCENARIO, changes)
            notes.add(what, **load.counts(), **_modest(load))


def _modest(load: Load) -> dict[str, Any]:
    """Return the figures of the four."""
    group = load.report.tally.kinds["modest"]
    return {
        "modest_sent": group.sent,
        "modest_ok": group.ok,
        "total_p99_ms": in_ms(group.total.percentile(0.99)),
        "first_p99_ms": in_ms(group.first_token.percentile(0.99)),
        "requests_per_s": load.figures["requests_per_s"],
    }


def judge(notes: Notes) -> list[Bar]:
    moves = {
        key: ratio(notes.median("greedy", key), notes.median("calm", key)) for key in ("total_p99_ms", "first_p99_ms")
    }
    p99, alone = (notes.median(what, "total_p99_ms") for what in ("greedy", "calm"))
    detail = (
        f"{figure(p99, 'ms')}, alone {figure(alone, 'ms')}; "
        f"first token x {figure(moves['first_p99_ms'])}; "
        f"{figure(notes.median('greedy', 'requests_per_s'), 'answers/s')} of {CAPACITY}"
    )
    sent, ok = notes.total("greedy", "modest_sent"), notes.total("greedy", "modest_ok")
    failed = None if sent is None or ok is None else sent - ok
    return [
        at_most(
            "fairness: p99 of four modest tenants, x without the greedy one", moves["total_p99_ms"], MAX_MOVE, detail
        ),
        at_most("fairness: requests of the four that failed", failed, 0, f"of {sent}"),
    ]


if __name__ == "__main__":
    sys.exit(main("router_fairness", measure, judge))
