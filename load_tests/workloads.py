"""What contestants are asked: four workloads, each greedy and to its full length, with token ids as prompts.

    single   1 at a time,  4 requests     64 prompt              + 128 output tokens
    conc16  16 at a time, 48 requests    128 prompt              + 128
    prefix  16 at a time, 48 requests    512 shared + 32 own     +  64
    longin   4 at a time,  8 requests  1,024 prompt              +  16

Half of the prompts are natural text behind one random id, the other half random ids, in turns; of the shared prefix it
is the first half and the second. Prompts are a pure function of seed, repetition and workload: within a repetition all
contestants get the same, in the next one nobody gets a prompt again.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from load_tests.natural_text import NaturalText

RANDOM_IDS = range(200, 49_000)
"""Ordinary tokens of the default model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Lengths in tokens. `unit` is what is compared: "tokens" (output tokens a second) or "requests" (a second)."""

    name: str
    requests: int
    concurrency: int
    shared: int = 0
    own: int
    output: int
    unit: str

    def shortened(self) -> Workload:
        """Return a workload of this kind that takes seconds: it shows that everything works, and measures nothing."""
        requests = min(self.requests, 4)
        return dataclasses.replace(
            self, requests=requests, concurrency=min(self.concurrency, requests), output=min(self.output, 8)
        )


WORKLOADS = (
    Workload(name="single", requests=4, concurrency=1, own=64, output=128, unit="tokens"),
    Workload(name="conc16", requests=48, concurrency=16, own=128, output=128, unit="tokens"),
    Workload(name="prefix", requests=48, concurrency=16, shared=512, own=32, output=64, unit="requests"),
    Workload(name="longin", requests=8, concurrency=4, own=1024, output=16, unit="requests"),
)


def make_prompts(workload: Workload, text: NaturalText, *, seed: int, repetition: int) -> list[list[int]]:
    """Return the prompts of all requests of `workload` in one repetition."""
    rng = random.Random(f"{seed} {repetition} {workload.name}")
    half = workload.shared // 2
    shared = _natural(text, rng, 1, half)[0] + _random(rng, workload.shared - half) if workload.shared else []
    natural = _natural(text, rng, (workload.requests + 1) // 2, workload.own)
    return [
        shared + (natural[number // 2] if number % 2 == 0 else _random(rng, workload.own))
        for number in range(workload.requests)
    ]


def warm_up_prompts(*, seed: int, repetition: int) -> list[list[int]]:
    """Return two short prompts that are sent before anything is measured."""
    rng = random.Random(f"{seed} {repetition} warm-up")
    return [_random(rng, 20) for _ in range(2)]


def _natural(text: NaturalText, rng: random.Random, count: int, size: int) -> list[list[int]]:
    """Return windows of the text, each behind a random id: the manual repeats itself, no cache may know a prompt."""
    return [_random(rng, 1) + window for window in text.windows(rng, count, size - 1)]


def _random(rng: random.Random, size: int) -> list[int]:
    return rng.choices(RANDOM_IDS, k=size)
