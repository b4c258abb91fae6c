"""The CPU side of the engine `paged`: computes a `StepPlan` in the calling thread, as one batch of rows, and draws.

Owns the memory of keys and values. Knows rows and blocks; decides nothing. A step that fails leaves the cache usable:
computing its chunks again writes the same values to the same places.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from workers import sampler
from workers.forward import Forward, Logits
from workers.kv_memory import KvMemory
from workers.plan import Chunk, StepOutput, StepPlan, accepted
from workers.sampler import Place
from workers.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class CpuTicket:
    """A step that is over when `launch` returns."""

    plan: StepPlan
    result: StepOutput
    computed_at: float
    """On ``time.monotonic``: all but drawing was done."""

    def output(self) -> StepOutput:
        return self.result


class CpuRunner:
    verifies_drafts = True

    def __init__(self, forward: Forward, cache: KvMemory) -> None:
        """`forward` computes over `cache`."""
        self._forward = forward
        self._cache = cache
        self.num_computed_rows = 0
        """Tokens that went through the model, those of repeated steps and of drafts among them."""

    def launch(self, plan: StepPlan) -> CpuTicket:
        """Compute `plan`. Raises LookupError for an unknown adapter, FloatingPointError for logits that are no numbers;
        the engine then finds out whose fault it is."""
        for chunk in plan.chunks:
            if chunk.sequence.adapter and chunk.sequence.adapter not in self._forward.adapters:
                raise LookupError(f"no adapter {chunk.sequence.adapter!r} is loaded")
        if plan.copies:
            self._cache.copy(plan.copies)
        self.num_computed_rows += plan.num_tokens
        logits, computed_at = self._forward.compute(plan.chunks), time.monotonic()
        return CpuTicket(plan, _sample(plan, logits), computed_at)

    def close(self) -> None:
        self._forward.close()


def _sample(plan: StepPlan, logits: Logits) -> StepOutput:
    """Draw a token from each row of `logits`, and verify the drafts by them."""
    sampling = [i for i, chunk in enumerate(plan.chunks) if chunk.samples]
    tokens: list[tuple[int, ...]] = [()] * len(plan.chunks)
    logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(plan.chunks)
    if not sampling:
        return StepOutput(tokens)
    places = [place for i in sampling for place in _places(plan.chunks[i])]
    drawn = sampler.draw(logits.values, places, logits.best)
    row = 0
    for i in sampling:
        chunk = plan.chunks[i]
        end = row + 1 + len(chunk.draft)
        tokens[i] = accepted(chunk.draft, drawn.tokens[row:end])
        if chunk.sequence.num_logprobs is not None:
            logprobs[i] = tuple(drawn.logprobs[place] for place in range(row, row + len(tokens[i])))
        row = end
    return StepOutput(tokens, logprobs if drawn.logprobs else ())


def _places(chunk: Chunk) -> Iterator[Place]:
    """What is drawn for a chunk that samples: the token that follows it, and one behind each of its draft."""
    position = chunk.start + chunk.num_tokens
    for count in range(len(chunk.draft) + 1):
        yield Place(chunk.sequence, position + count, chunk.draft[:count])
