"""One run of a lean client in a process of its own: what it sends, what it counts, what that takes of the target."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from load_tests.rigs.client_process import ClientProcess
from load_tests.rigs.lean_client import DRAIN_S, LeanCounts
from load_tests.rigs.router_clock import TICKS_PER_S
from load_tests.rigs.router_model import RIG_WORDS


@dataclass(frozen=True, slots=True, kw_only=True)
class LeanLoad:
    """A closed loop of `streams` requests at a time."""

    call: str
    streams: int = 64
    output: int
    prompt: int = 32
    duration_s: float
    warm_up_s: float = 1.0
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
    async with ClientProcess("lean_client", _job(rig.address, load)) as client:
        before = rig.cpu_s()
        async with asyncio.timeout(load.duration_s + 2 * DRAIN_S):
            report = await client.ask({})
        after = rig.cpu_s()
    return counts_of(report), {name: used - before[name] for name, used in after.items()}


def counts_of(report: Mapping[str, Any]) -> LeanCounts:
    """Return what a client says that it counted, as it was before it was JSON."""
    counts = {name: value for name, value in report.items() if name != "event"}
    ages = {int(ticks): number for ticks, number in report["ages"].items()}
    return LeanCounts(**counts | {"errors": Counter(report["errors"]), "ages": Counter(ages)})


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


def _job(target: str, load: LeanLoad) -> dict[str, Any]:
    return {
        "target": target,
        "ca_file": load.ca_file,
        "token": load.token,
        "call": load.call,
        "streams": load.streams,
        "output": load.output,
        "prompt": load.prompt,
        "duration_s": load.duration_s,
        "warm_up_s": min(load.warm_up_s, load.duration_s / 2),
        "seed": 1,
        "is_staggered": load.is_staggered,
        "requests": load.requests,
        "clock": [RIG_WORDS.start, len(RIG_WORDS), TICKS_PER_S] if load.tells_time else None,
    }
