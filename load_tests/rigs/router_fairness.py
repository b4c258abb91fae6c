"""One tenant who sends twenty times its share, beside four who stay at 60 % of theirs: what it costs these four.

A fake replica of 200 requests a second: 64 at a time, 16 steps of 20 ms each. Five tenants, each on a Session of its
own, Poisson, the greedy one from a process of its own; of 896 requests offered a second three quarters have to be
refused. In one router phases with and without the greedy one alternate, first seconds included; what counts is by how
much the p99 of the four, from when a request was due to the end of its answer, is longer with it.

Their first tokens are judged by the same fifth of an answer's time, and not by a ratio of their own: alone, a request
waits for no place and its first token is that of the next step. In a replica that is full it has to wait until one of
those that run has ended, whoever they are, as nobody is stopped for another, and places become free at the end of a
step only.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, difference, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.client_process import ClientProcess
from load_tests.rigs.rig_load import idle_after
from load_tests.rigs.router_rig import RigConfig, RouterRig

PLACES, STEP_S, OUTPUT, PROMPT = 64, 0.02, 16, 32
CAPACITY = PLACES / (STEP_S * OUTPUT)
MODEST = {f"modest-{number}": 0.6 * CAPACITY / 5 for number in range(4)}
GREEDY = {"greedy": 20 * CAPACITY / 5}
TIMEOUT_S = 5
PHASES, PHASE_S = 3, 8.0
"""Of each kind, in one repetition."""
MAX_MOVE = 1.2
TENANT_HEADER = "x-octavo-tenant"


async def measure(settings: Settings, notes: Notes) -> None:
    config = RigConfig(step_s=STEP_S, num_sequences=PLACES, tells_time=True, router={"tenant_header": TENANT_HEADER})
    for repetition in settings.rounds():
        with RouterRig(config) as rig:
            async with AsyncExitStack() as stack:
                modest, greedy = [
                    await stack.enter_async_context(ClientProcess("tenant_client", _job(rig, tenants, repetition)))
                    for tenants in (MODEST, GREEDY)
                ]
                seen: dict[str, list[dict[str, Any]]] = {"calm": [], "greedy": []}
                for _ in range(1 if settings.is_quick else PHASES):
                    for what, clients in (("calm", [modest]), ("greedy", [modest, greedy])):
                        seen[what].append(await _phase(what, rig, clients, settings.seconds(PHASE_S), notes))
        for what, phases in seen.items():
            notes.add(f"{what}, the four", **_times(phases))


def _job(rig: RouterRig, tenants: dict[str, float], seed: int) -> dict[str, Any]:
    return {
        "target": rig.address,
        "header": TENANT_HEADER,
        "tenants": tenants,
        "prompt": PROMPT,
        "output": OUTPUT,
        "timeout_s": TIMEOUT_S,
        "seed": seed,
    }


async def _phase(
    what: str, rig: RouterRig, clients: list[ClientProcess], duration_s: float, notes: Notes
) -> dict[str, Any]:
    """Let `clients` send at once; note what came, and return what came to the first of them."""
    before, began = rig.cpu_s(), time.monotonic()
    reports = await asyncio.gather(*(client.ask({"duration_s": duration_s}) for client in clients))
    after, took_s = rig.cpu_s(), time.monotonic() - began
    modest = reports[0]
    notes.add(
        what,
        **summed(reports),
        modest_sent=modest["sent"],
        modest_ok=modest["ok"],
        answers_per_s=sum(report["ok"] for report in reports) / took_s,
        sent_late_ms=1e3 * max(report["late_s"] for report in reports),
        router_cpu_share=(after["router"] - before["router"]) / took_s,
        clients_cpu_share=sum(report["cpu_s"] for report in reports) / took_s,
        idle_s=await idle_after(rig.address),
    )
    return modest


def summed(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what several clients counted together."""
    errors = Counter[str]()
    for report in reports:
        errors.update(report["errors"])
    counts = {key: sum(report[key] for report in reports) for key in ("sent", "ended", "extra", "ok")}
    return {**counts, "errors": dict(errors)}


def _times(phases: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the percentiles of the four over all phases of one kind."""
    figures: dict[str, Any] = {}
    for what in ("first", "total"):
        values = sorted(value for phase in phases for value in phase[f"{what}_s"])
        for share in (0.5, 0.99):
            at = min(int(share * len(values)), len(values) - 1)
            figures[f"{what}_p{100 * share:g}_ms"] = 1e3 * values[at] if values else None
    return {"requests": sum(phase["ok"] for phase in phases), **figures}


def judge(notes: Notes) -> list[Bar]:
    def beside(key: str) -> tuple[float | None, float | None, str]:
        p99, alone = (notes.median(f"{what}, the four", key) for what in ("greedy", "calm"))
        return p99, alone, f"{figure(p99, 'ms')}, alone {figure(alone, 'ms')}"

    total, total_alone, totals = beside("total_p99_ms")
    first, first_alone, firsts = beside("first_p99_ms")
    used = ", ".join(
        f"{figure(notes.median('greedy', key))} {what}"
        for key, what in (("router_cpu_share", "of a core in the router"), ("clients_cpu_share", "in the clients"))
    )
    detail = (
        f"{totals}; {figure(notes.median('greedy', 'answers_per_s'), 'answers/s')} of {CAPACITY:g}; {used}; "
        f"sent {figure(notes.worst('greedy', 'sent_late_ms'), 'ms')} late at most"
    )
    sent, ok = notes.total("greedy", "modest_sent"), notes.total("greedy", "modest_ok")
    return [
        at_most(
            "fairness: p99 of four modest tenants, x without the greedy one",
            ratio(total, total_alone),
            MAX_MOVE,
            detail,
        ),
        at_most(
            "fairness: p99 first token of the four, later by x the time of an answer alone",
            ratio(difference(first, first_alone), total_alone),
            MAX_MOVE - 1,
            f"{firsts}; a step takes {1e3 * STEP_S:g} ms",
        ),
        at_most("fairness: requests of the four that failed", difference(sent, ok), 0, f"of {figure(sent)}"),
    ]


if __name__ == "__main__":
    sys.exit(main("router_fairness", measure, judge))
