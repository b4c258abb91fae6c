"""Attention on the CPU with torch alone: all decodes of similar context in one batched product, chunks by SDPA.

    decode   keys of the group gathered in the order [row, kv_head, block] -> [row * kv_head, length, dim];
             the query heads that share a key head are the rows of its product
    chunk    the sequence's keys gathered to [kv_head, length, dim]; SDPA, causal from `start`

No loop over sequences in decode; one over the step's chunks in prefill. Types that the CPU does not multiply
are widened.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers import kernels
from workers.attention.cache import KvCache
from workers.attention.layout import DecodeGroup, Span, StepLayout


class CpuAttention:
    def prepare(self, layout: StepLayout, cache: KvCache) -> _Step:
        return _Step(layout, cache)


class _Step:
    def __init__(self, layout: StepLayout, cache: KvCache) -> None:
        self._cache = cache
        self._index = cache.row_index(layout.blocks, layout.offsets)
        compute = cache.dtype if kernels.kernel_for(cache.dtype) == "onednn" else torch.float32
        self._parts: list[_Decode | _Prefill] = [_Decode(group, cache, compute) for group in layout.decodes]
        self._parts += [_Prefill(span, cache, compute) for span in layout.spans]

    def attend(self, layer: int, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        self._cache.write(layer, self._index, keys, values)
        output = torch.empty_like(queries)
        for part in self._parts:
            part.attend(layer, queries, output)
        return output.flatten(1)


class _Gather:
    """Reads whole blocks, in an order that is fixed for the step, into memory that all its layers share."""

    def __init__(self, tables: torch.Tensor, cache: KvCache, compute: torch.dtype) -> None:
        """`tables` is [n, blocks]."""
        heads = torch.arange(cache.num_kv_heads)
        self._index = (tables[:, None, :] * cache.num_kv_heads + heads[:, None]).flatten()
        self._block = cache.block_size * cache.head_dim
        self._size = (len(tables) * cache.num_kv_heads, tables.shape[1] * cache.block_size, cache.head_dim)
        self._compute = compute
        self._memory = torch.empty(2, len(self._index), self._block, dtype=cache.dtype)

    def __call__(self, store: torch.Tensor, place: int) -> torch.Tensor:
        """Return [n * kv_heads, blocks * block_size, head_dim] of a layer's keys (place 0) or values (place 1)."""
        memory = self._memory[place]
        torch.index_select(store.view(-1, self._block), 0, self._index, out=memory)
        return memory.view(self._size).to(self._compute)


class _Decode:
    def __init__(self, group: DecodeGroup, cache: KvCache, compute: torch.dtype) -> None:
        self._cache = cache
        self._rows = group.rows
        self._gather = _Gather(group.tables, cache, compute)
        self._compute = compute
        length = group.tables.shape[1] * cache.block_size
        beyond = torch.arange(length) >= group.lengths[:, None]
        self._mask = torch.zeros(len(group.rows), 1, length).masked_fill_(beyond[:, None], -math.inf)

    def attend(self, layer: int, queries: torch.Tensor, output: torch.Tensor) -> None:
        cache, num_rows = self._cache, len(self._rows)
        own = queries[self._rows].to(self._compute) * cache.head_dim**-0.5
        scores = torch.bmm(
            own.view(num_rows * cache.num_kv_heads, -1, cache.head_dim),
            self._gather(cache.keys[layer], 0).transpose(1, 2),
        )
        masked = scores.view(num_rows, -1, scores.shape[-1]) + self._mask
        weights = masked.softmax(-1).to(self._compute).view_as(scores)
        mixed = torch.bmm(weights, self._gather(cache.values[layer], 1))
        output[self._rows] = mixed.view(num_rows, -1, cache.head_dim).to(output.dtype)


class _Prefill:
    def __init__(self, span: Span, cache: KvCache, compute: torch.dtype) -> None:
        self._cache = cache
        self._rows = slice(span.first, span.first + span.num_rows)
        self._gather = _Gather(span.table[None], cache, compute)
        self._compute = compute
        self._length = span.start + span.num_rows
        self._mask = None
        if span.start:
            self._mask = torch.ones(span.num_rows, self._length, dtype=torch.bool).tril_(span.start)

    def attend(self, layer: int, queries: torch.Tensor, output: torch.Tensor) -> None:
        cache = self._cache
        mixed = scaled_dot_product_attention(
            queries[self._rows].transpose(0, 1)[None].to(self._compute),
            self._gather(cache.keys[layer], 0)[None, :, : self._length],
            self._gather(cache.values[layer], 1)[None, :, : self._length],
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=True,
        )
        output[self._rows] = mixed[0].transpose(0, 1).to(output.dtype)
