"""One scenario sent to one rig: the report, what each process used for it, and whether anything was left behind."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.client import Client
from octavo.v1.status_service_pb2 import GetStatusResponse

from load_tests.generator.report import Report
from load_tests.generator.run import run_scenario
from load_tests.generator.scenario import read_scenario
from load_tests.generator.tally import GENERATOR_FULL, NO_TERMINAL
from load_tests.rigs.bar_command import StoppedError
from load_tests.rigs.router_rig import RouterRig, is_router

IDLE_S = 5.0
"""How long a rig may take to have nothing queued, running or held."""
_POLL_S = 0.02
_SAMPLE_S = 0.5
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    report: Report
    cpu_s: Mapping[str, float]
    """By process of the rig, while the load ran."""
    router_bytes: tuple[float, ...]
    """Resident memory of all routers, sampled evenly."""
    idle_s: float | None
    """From the last terminal until nothing was queued, running or held; None: never."""

    @property
    def figures(self) -> Mapping[str, float | None]:
        return self.report.figures

    def counts(self) -> dict[str, Any]:
        """Return what every run notes: requests and terminals, what failed and how, what was left, CPU."""
        tally = self.report.tally
        every = tally.all
        return {
            "sent": every.sent,
            "ended": every.ok + every.cancelled + every.refused + every.failed - tally.errors[NO_TERMINAL],
            "ok": every.ok,
            "errors": dict(tally.errors),
            "late": tally.late,
            "idle_s": self.idle_s,
            "lag_p99_ms": in_ms(self.figures["lag_s.p99"]),
            "router_cpu_s": round(sum(s for name, s in self.cpu_s.items() if is_router(name)), 2),
            "replicas_cpu_s": round(sum(s for name, s in self.cpu_s.items() if not is_router(name)), 2),
            "generator_cpu_share": self.figures["generator_cpu_share"],
            "generator_full": tally.errors[GENERATOR_FULL],
        }


def in_ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


async def send(rig: RouterRig, scenario: str, changes: Mapping[str, Any]) -> Load:
    """Send a scenario of load_tests/scenarios to `rig`, if that has several routers each process of the generator to
    another. Raises StoppedError if it was stopped, CrewError."""
    table, folder = read_scenario(scenario, changes)
    before, samples = rig.cpu_s(), list[float]()
    sampling = asyncio.create_task(_sample([pid for name, pid in rig.pids.items() if is_router(name)], samples))
    try:
        report = await run_scenario(table, folder, *rig.addresses)
    finally:
        sampling.cancel()
    if not report.is_whole:
        raise StoppedError
    after = rig.cpu_s()
    return Load(
        report=report,
        cpu_s={name: used - before[name] for name, used in after.items()},
        router_bytes=tuple(samples),
        idle_s=await idle_after(*rig.routers.values()),
    )


async def idle_after(*addresses: str) -> float | None:
    """Return how long it takes until these routers and their replicas have nothing left; None: more than IDLE_S."""
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(address)) for address in addresses]
        while (waited := time.monotonic() - began) < IDLE_S:
            if not any([left_behind(await client.status()) for client in clients]):
                return round(waited, 3)
            await asyncio.sleep(_POLL_S)
    return None


def left_behind(status: GetStatusResponse) -> list[str]:
    """Return what a router and its replicas still have, in words; nothing when all is over."""
    router = status.router
    left = {
        "queued": router.num_queued_requests,
        "queued tokens": router.num_queued_tokens,
        "running": router.num_running_requests,
        "accepted and not ended": router.num_accepted_total - router.num_ended_total,
    }
    for replica in status.replicas:
        left[f"running on {replica.id}"] = replica.num_running + replica.num_waiting
        left[f"blocks of {replica.id}"] = replica.num_blocks - replica.num_free_blocks
    return [f"{what}: {number}" for what, number in left.items() if number]


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES


async def _sample(pids: Sequence[int], samples: list[float]) -> None:
    while True:
        samples.append(sum(map(_resident_bytes, pids)))
        await asyncio.sleep(_SAMPLE_S)
