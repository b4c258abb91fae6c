"""The timing attack on shared prefixes, done to one's own cluster: can one tenant find out what another one asked?

As published for CVE-2025-46570: a prompt whose beginning somebody asked before is answered sooner, because its blocks
are cached. In each round the victim asks a prompt of random tokens; then the attacker asks that prompt and a new one,
in random order, and measures the time to the first token. Whoever can tell the two apart by the time knows what the
victim asked. How well that goes is the area under the ROC curve: 1 is always, 0.5 is guessing.

The same with the victim as its own attacker shows that the check can see: within a tenant the cache is shared, on
purpose.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

from octavo.client import Client

MAX_ISOLATED_AUC = 0.55
MIN_SEEING_AUC = 0.9


@dataclass(frozen=True, slots=True)
class Probes:
    """Seconds to the first token of prompts that the victim asked before, and of new ones; and how many tokens of the
    first ones the cluster said were cached."""

    asked_s: list[float] = field(default_factory=list)
    new_s: list[float] = field(default_factory=list)
    cached_tokens: list[int] = field(default_factory=list)

    @property
    def auc(self) -> float:
        return roc_auc(self.asked_s, self.new_s)


def roc_auc(lower: Sequence[float], higher: Sequence[float]) -> float:
    """Return how probably one of `lower` is below one of `higher`, ties counting half: the area under the ROC curve
    (Mann and Whitney's U divided by the number of pairs). Both have values."""
    ordered = sorted(lower)
    won = sum(bisect_left(ordered, each) + bisect_right(ordered, each) for each in higher)
    return won / (2 * len(lower) * len(higher))


async def probe(
    victim: Client,
    attacker: Client,
    *,
    rounds: int,
    num_tokens: int,
    rng: random.Random,
    model: str = "",
) -> Probes:
    """Attack `victim` as `attacker`, with prompts of `num_tokens`. Raises CallError."""
    listed = await victim.list_models()
    # Of a model that is not served the first call says so.
    vocab_size = min((each.vocab_size for each in listed if not model or each.name == model), default=1)
    probes = Probes()
    for _ in range(rounds):
        asked, new = ([rng.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(2))
        await _first_token(victim, asked, model)
        for prompt in rng.sample((asked, new), 2):
            first_s, num_cached = await _first_token(attacker, prompt, model)
            (probes.asked_s if prompt is asked else probes.new_s).append(first_s)
            if prompt is asked:
                probes.cached_tokens.append(num_cached)
    return probes


async def _first_token(client: Client, prompt: list[int], model: str) -> tuple[float, int]:
    """Return the time to the first token and how much of the prompt was cached."""
    begun = time.perf_counter()
    first_s = 0.0
    generation = client.generate(prompt, model=model, max_tokens=1, temperature=0.0, ignore_eos=True)
    async for _ in generation:
        first_s = first_s or time.perf_counter() - begun
    return first_s, 0 if generation.usage is None else generation.usage.cached_tokens
