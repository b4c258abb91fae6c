"""The CPU side of the engine `paged`: computes a `StepPlan` in the calling thread, as one batch of rows.

Owns the model and the memory of keys and values. Knows rows and blocks; decides nothing. A step that fails leaves the
cache usable: computing its chunks again writes the same values to the same places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from workers import sampler
from workers.attention.backend import AttentionBackend
from workers.attention.cache import KvCache
from workers.attention.layout import StepLayout, lay_out
from workers.models.llama import LlamaModel
from workers.plan import StepOutput, StepPlan


@dataclass(frozen=True, slots=True)
class CpuTicket:
    """A step that is over when `launch` returns."""

    plan: StepPlan
    result: StepOutput

    def output(self) -> StepOutput:
        return self.result


class CpuRunner:
    def __init__(self, model: LlamaModel, cache: KvCache, attention: AttentionBackend) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention
        self.num_computed_rows = 0
        """Tokens that went through the model, those of repeated steps among them."""

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
            logits = self.logits(layout)
            tokens: list[tuple[int, ...]] = [()] * len(plan.chunks)
            sampling = [plan.chunks[i] for i in layout.sampling_chunks]
            if sampling:
                drawn = sampler.draw(
                    logits,
                    [chunk.sequence for chunk in sampling],
                    [chunk.start + chunk.num_tokens for chunk in sampling],
                )
                for i, token in zip(layout.sampling_chunks, drawn, strict=True):
                    tokens[i] = (token,)
        return CpuTicket(plan, StepOutput(tokens))

    def logits(self, layout: StepLayout) -> torch.Tensor:
        """Compute the rows of `layout`; return the logits of those that sample, [n, vocab] in fp32."""
        self._cache.clear(layout.begun_blocks)
        self.num_computed_rows += len(layout.tokens)
        return self._model.forward(layout, self._attention.prepare(layout, self._cache))

    def close(self) -> None:
        """Nothing to hand back: memory goes with the last reference."""
