"""Attention as the formula has it, one row at a time over its blocks: what the tests hold the others against. Slow."""

from __future__ import annotations

import torch

from workers.attention.cache import KvCache
from workers.attention.layout import StepLayout


class ReferenceAttention:
    def prepare(self, layout: StepLayout, cache: KvCache) -> _Step:
        return _Step(layout, cache)


class _Step:
    def __init__(self, layout: StepLayout, cache: KvCache) -> None:
        self._cache = cache
        self._index = cache.row_index(layout.blocks, layout.offsets)
        self._contexts: list[tuple[torch.Tensor, int]] = [(torch.empty(0), 0)] * len(layout.tokens)
        """Per row: its block table, and how many tokens it attends to."""
        for group in layout.decodes:
            for row, table, length in zip(group.rows.tolist(), group.tables, group.lengths.tolist(), strict=True):
                self._contexts[row] = (table, length)
        for span in layout.spans:
            for i in range(span.num_rows):
                self._contexts[span.first + i] = (span.table, span.start + i + 1)

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        cache = self._cache
        cache.write(layer, self._index, keys, values)
        share = queries.shape[1] // cache.num_kv_heads
        rows = []
        for query, (table, length) in zip(queries, self._contexts, strict=True):
            past_keys, past_values = (
                store[table].transpose(0, 1).flatten(1, 2)[:, :length].repeat_interleave(share, dim=0).float()
                for store in (cache.keys[layer], cache.values[layer])
            )
            scores = torch.einsum("hd,hld->hl", query.float(), past_keys) * cache.head_dim**-0.5
            rows.append(torch.einsum("hl,hld->hd", scores.softmax(-1), past_values).flatten())
        return torch.stack(rows).to(queries.dtype)
