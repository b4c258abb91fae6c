"""The seam between a model and how it attends: two methods, one per step and one per layer."""

from __future__ import annotations

from typing import Protocol

import torch

from workers.attention.cache import KvCache
from workers.attention.layout import StepLayout


class StepAttention(Protocol):
    """Attention of one step, its indices ready."""

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write the step's keys and values [rows, kv_heads, head_dim] to the cache, then let every query
        [rows, heads, head_dim] attend to the positions of its sequence up to its own; return [rows, heads * head_dim].
        Rotary embedding has been applied."""


class AttentionBackend(Protocol):
    def prepare(self, layout: StepLayout, cache: KvCache) -> StepAttention:
        """Compute once what all layers of a step share."""
