"""A `Forward` in torch: lays a step out as tensors and runs the model over it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from collections.abc import Set
from typing import Protocol

import torch

from workers.attention.backend import AttentionBackend, StepAttention
from workers.attention.cache import KvCache
from workers.attention.layout import StepLayout, lay_out
from workers.forward import Logits
from workers.plan import Chunk


class StepModel(Protocol):
    @property
    def adapters(self) -> Set[str]: ...

    def forward(self, layout: StepLayout, attention: StepAttention) -> torch.Tensor:
        """Compute the rows of a step; return the logits [len(layout.sampling_rows), vocab_size] in fp32."""


class TorchForward:
    def __init__(self, model: StepModel, cache: KvCache, attention: AttentionBackend) -> None:
        self._model = model
        self._cache = cache
        self._attention = attention

    @property
    def adapters(self) -> Set[str]:
        return self._model.adapters

    @torch.inference_mode()
    def compute(self, chunks: Seq[Chunk], *, all_rows: bool = False) -> Logits:
        layout = lay_out(chunks, self._cache.block_size)
        if all_rows:
            layout = dataclasses.replace(layout, sampling_rows=torch.arange(len(layout.tokens)))
        self._cache.clear(layout.begun_blocks)
        return Logits(self._model.forward(layout, self._attention.prepare(layout, self._cache)).numpy())

    def close(self) -> None:
        """Nothing to hand back: memory goes with the last reference."""
