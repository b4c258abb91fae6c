"""One workload, sent and measured: what every contestant goes through, whatever protocol it speaks."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from load_tests.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One request: seconds to its first token and to its end, counts of tokens, and the tokens if they were told."""

    first_token_s: float
    total_s: float
    num_tokens: int
    num_cached: int | None
    """Of the prompt; None if the server does not say."""
    token_ids: tuple[int, ...] = ()


class Driver(Protocol):
    """A connection to one server, for as long as its scope."""

    async def ask(self, prompt: Sequence[int], num_tokens: int) -> Sample:
        """Let the server answer greedily with exactly `num_tokens`. Raises AskError."""


class AskError(Exception):
    """A server refused, broke off or gave less than it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """Figures of one workload in one repetition. `cached_tokens` is None if the server does not say."""

    workload: str
    requests: int
    wall_s: float
    output_tokens_per_s: float
    requests_per_s: float
    first_token_p50_ms: float
    first_token_max_ms: float
    per_token_p50_ms: float
    cached_tokens: int | None


async def measure(
    driver: Driver, workload: Workload, prompts: Sequence[Sequence[int]]
) -> tuple[Measurement, list[Sample]]:
    """Send `prompts`, `workload.concurrency` at a time; return the figures and the samples in the order of the prompts.

    Raises AskError for an answer that is not of the length that was asked for: it would be compared with longer ones.
    """
    slots = asyncio.Semaphore(workload.concurrency)

    async def one(prompt: Sequence[int]) -> Sample:
        async with slots:
            return await driver.ask(prompt, workload.output)

    begin = time.perf_counter()
    samples = await asyncio.gather(*(one(prompt) for prompt in prompts))
    wall_s = time.perf_counter() - begin
    for sample in samples:
        if sample.num_tokens != workload.output:
            raise AskError(f"{workload.name}: an answer has {sample.num_tokens} tokens, asked for {workload.output}")
    return summarise(workload.name, wall_s, samples), samples


def summarise(workload: str, wall_s: float, samples: Sequence[Sample]) -> Measurement:
    firsts = [sample.first_token_s for sample in samples]
    later = [(sample.total_s - sample.first_token_s) / max(1, sample.num_tokens - 1) for sample in samples]
    cached = [sample.num_cached for sample in samples if sample.num_cached is not None]
    return Measurement(
        workload=workload,
        requests=len(samples),
        wall_s=round(wall_s, 3),
        output_tokens_per_s=round(sum(sample.num_tokens for sample in samples) / wall_s, 2),
        requests_per_s=round(len(samples) / wall_s, 4),
        first_token_p50_ms=round(1e3 * statistics.median(firsts), 2),
        first_token_max_ms=round(1e3 * max(firsts), 2),
        per_token_p50_ms=round(1e3 * statistics.median(later), 3),
        cached_tokens=sum(cached) if len(cached) == len(samples) else None,
    )
