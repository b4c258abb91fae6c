"""The processes of lean clients of one run: started together, begun together, their counts merged; none is left."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.grpc_environment import process_environment
from load_tests.rigs.lean_client import DRAIN_S, LeanCounts
from load_tests.rigs.router_clock import TICKS_PER_S
from load_tests.rigs.router_model import RIG_WORDS
from load_tests.rigs.router_rig import ROOT

READY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanLoad:
    """A closed loop of `streams` requests at a time, shared by `processes`."""

    call: str
    streams: int = 64
    output: int
    prompt: int = 32
    duration_s: float
    warm_up_s: float = 1.0
    processes: int = 1
    tells_time: bool = True
    """Whether the rig's tokens say when they were made."""
    requests: int = 0
    """Send so many, within the duration; 0: as many as there is time for."""
    is_staggered: bool = False
    """Whether the first answer of each stream is shorter, of each by another length: otherwise all end at once, again
    and again, and what is measured is 64 requests that begin in one step."""
    ca_file: str = ""
    """Whom to trust, for TLS; empty: none."""
    token: str = ""
    """The bearer token of every call; empty: none."""


class Target(Protocol):
    """What is loaded."""

    @property
    def address(self) -> str: ...
    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds of each of its processes so far."""


async def load(rig: Target, load: LeanLoad) -> tuple[LeanCounts, dict[str, float]]:
    """Send it; return what came, and the CPU seconds of each process of the target meanwhile."""
    processes: list[asyncio.subprocess.Process] = []
    try:
        for index in range(load.processes):
            processes.append(await _start(rig.address, load, index))
        async with asyncio.timeout(READY_S):
            await asyncio.gather(*map(_hear, processes))
        before = rig.cpu_s()
        for process in processes:
            _tell(process, {})
        async with asyncio.timeout(load.duration_s + 2 * DRAIN_S):
            reports = await asyncio.gather(*map(_hear, processes))
        after = rig.cpu_s()
    finally:
        await asyncio.gather(*map(_end, processes))
    return merged(reports), {name: used - before[name] for name, used in after.items()}


def merged(reports: list[dict[str, Any]]) -> LeanCounts:
    """Return the counts of several processes as one's."""
    whole = LeanCounts()
    for report in reports:
        for name in ("sent", "ended", "ok", "extra", "tokens", "tokens_timed", "ok_timed", "messages", "cpu_s"):
            setattr(whole, name, getattr(whole, name) + report[name])
        whole.errors.update(report["errors"])
        whole.ages.update({int(ticks): count for ticks, count in report["ages"].items()})
        whole.timed_s = report["timed_s"]
    return whole


def age_ms(ages: Mapping[int, int], share: float) -> float | None:
    """Return the age that `share` of the tokens did not exceed; None without tokens."""
    left = share * sum(ages.values())
    for ticks, count in sorted(ages.items()):
        left -= count
        if left <= 0:
            return 1e3 * ticks / TICKS_PER_S
    return None


def summary(counts: LeanCounts, cpu_s: Mapping[str, float]) -> dict[str, Any]:
    """Return what a run of a lean load notes."""
    replicas = sum(used for name, used in cpu_s.items() if name != "router")
    return {
        "sent": counts.sent,
        "ended": counts.ended,
        "extra": counts.extra,
        "ok": counts.ok,
        "errors": dict(counts.errors),
        "tokens": counts.tokens,
        "tokens_per_s": counts.tokens_timed / counts.timed_s,
        "requests_per_s": counts.ok_timed / counts.timed_s,
        "tokens_a_message": counts.tokens / max(counts.messages, 1),
        "age_p50_ms": age_ms(counts.ages, 0.5),
        "age_p99_ms": age_ms(counts.ages, 0.99),
        "router_us_per_token": 1e6 * cpu_s["router"] / max(counts.tokens, 1),
        "replica_us_per_token": 1e6 * replicas / max(counts.tokens, 1),
        "client_us_per_token": 1e6 * counts.cpu_s / max(counts.tokens, 1),
    }


async def _start(target: str, load: LeanLoad, index: int) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "load_tests.rigs.lean_client"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
        limit=16 << 20,
        env=process_environment(),
    )
    job = {
        "target": target,
        "ca_file": load.ca_file,
        "token": load.token,
        "call": load.call,
        "streams": load.streams // load.processes,
        "output": load.output,
        "prompt": load.prompt,
        "duration_s": load.duration_s,
        "warm_up_s": min(load.warm_up_s, load.duration_s / 2),
        "seed": index + 1,
        "is_staggered": load.is_staggered,
        "requests": load.requests // load.processes,
        "clock": [RIG_WORDS.start, len(RIG_WORDS), TICKS_PER_S] if load.tells_time else None,
    }
    _tell(process, job)
    return process


def _tell(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")


async def _hear(process: asyncio.subprocess.Process) -> dict[str, Any]:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise RuntimeError(f"a lean client ended with code {await process.wait()}; it says above why")
    report: dict[str, Any] = json.loads(line)
    return report


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), 5.0)
    except TimeoutError:
        process.kill()
        await process.wait()
