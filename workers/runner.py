"""The CPU side of the engine `paged`: computes a `StepPlan` in the calling thread, as one batch of rows.

Owns the model and the memory of keys and values. Knows rows and blocks; decides nothing. A step that fails leaves the
cache usable: computing its chunks again writes the same values to the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from workers import sampler
from workers.attention.backend import AttentionBackend
from workers.attention.cache import KvCache
from workers.attention.layout import StepLayout, lay_out
from workers.models.llama import LlamaModel
from workers.plan import Chunk, StepOutput, StepPlan, accepted
from workers.sampler import Place
from workers.types import TokenLogprobs


@dataclass(frozen=True, slots=True)
class CpuTicket:
    """A step that is over when `launch` returns."""

    plan: StepPlan
    result: StepOutput

    def output(self) -> StepOutput:
        return self.result


class CpuRunner:
    verifies_drafts = True

    def __init__(self, model: LlamaModel, cache: KvCache, attention: AttentionBackend) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self.num_computed_rows = 0
        """Tokens that went through the model, those of repeated steps and of drafts among them."""

    def launch(self, plan: StepPlan) -> CpuTicket:
        """Compute `plan`. Raises LookupError for an unknown adapter, FloatingPointError for logits that are no numbers;
        the engine then finds out whose fault it is."""
        for chunk in plan.chunks:
            if chunk.sequence.adapter and chunk.sequence.adapter not in self._model.adapters:
                raise LookupError(f"no adapter {chunk.sequence.adapter!r} is loaded")
        with torch.inference_mode():
            if plan.copies:
                self._cache.copy(plan.copies)
            layout = lay_out(plan.chunks, self._cache.block_size)
            return CpuTicket(plan, _sample(plan, layout, self.logits(layout)))

    def logits(self, layout: StepLayout) -> torch.Tensor:
        """Compute the rows of `layout`; return the logits of those that sample, [n, vocab] in fp32."""
        self._cache.clear(layout.begun_blocks)
        self.num_computed_rows += len(layout.tokens)
        return self._model.forward(layout, self._attention.prepare(layout, self._cache))

    def close(self) -> None:
        """Nothing to hand back: memory goes with the last reference."""


def _sample(plan: StepPlan, layout: StepLayout, logits: torch.Tensor) -> StepOutput:
    """Draw a token from each row of `logits`, those of ``layout.sampling_rows``, and verify the drafts by them."""
    chunks = [plan.chunks[i] for i in layout.sampling_chunks]
    places = [place for chunk in chunks for place in _places(chunk)]
    tokens: list[tuple[int, ...]] = [()] * len(plan.chunks)
    logprobs: list[tuple[TokenLogprobs, ...]] = [()] * len(plan.chunks)
    if not places:
        return StepOutput(tokens)
    drawn = sampler.draw(logits, places)
    row = 0
    for i, chunk in zip(layout.sampling_chunks, chunks, strict=True):
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
