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
        if len(self._parts) == 1:  # it has all rows, in their order
            return self._parts[0].attend(layer, queries).flatten(1)
        output = torch.empty_like(queries)
        for part in self._parts:
            output[part.rows] = part.attend(layer, queries[part.rows])
        return output.flatten(1)


class _Gather:
    """Reads whole blocks, in an order that is fixed for the step, into memory that all its layers share."""

    def __init__(self, tables: torch.Tensor, cache: KvCache, compute: torch.dtype) -> None:
        """`tables` is [n, blocks]. What is read is in `memory` [2, n * kv_heads, blocks * block_size, head_dim], keys
        and values of a layer in the type `compute`, until the next layer is read."""
        heads = torch.arange(cache.num_kv_heads)
        keys = (tables[:, None, :] * cache.num_kv_heads + heads[:, None]).flatten()
        self._index = torch.cat((keys, keys + cache.num_blocks * cache.num_kv_heads))
        self._blocks = cache.blocks
        self._read = torch.empty(len(self._index), cache.block_size * cache.head_dim, dtype=cache.dtype)
        size = (2, len(tables) * cache.num_kv_heads, tables.shape[1] * cache.block_size, cache.head_dim)
        self._is_narrow = cache.dtype is not compute
        self.memory = torch.empty(size, dtype=compute) if self._is_narrow else self._read.view(size)

    def __call__(self, layer: int) -> None:
        torch.index_select(self._blocks[layer], 0, self._index, out=self._read)
        if self._is_narrow:
            self.memory.copy_(self._read.view(self.memory.shape))


class _Decode:
    def __init__(self, group: DecodeGroup, cache: KvCache, compute: torch.dtype) -> None:
        self.rows = group.rows
        self._gather = _Gather(group.tables, cache, compute)
        length = int(group.lengths.max())
        keys, self._values = self._gather.memory[:, :, :length]
        self._keys = keys.transpose(1, 2)
        self._compute = compute
        self._scale = cache.head_dim**-0.5
        beyond = torch.arange(length) >= group.lengths[:, None]
        mask = torch.zeros(beyond.shape, dtype=compute).masked_fill_(beyond, -math.inf)
        self._mask = mask.repeat_interleave(cache.num_kv_heads, 0)[:, None]
        """[n * kv_heads, 1, length]."""
        self._uses_mask = int(beyond.any())
        """0 or 1, the factor of the mask in the product: one row, or rows of one length, need none."""

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Map [n, heads, head_dim] to the same."""
        self._gather(layer)
        size = queries.shape
        own = queries.reshape(self._keys.shape[0], -1, size[-1]).to(self._compute)
        scores = torch.baddbmm(self._mask, own, self._keys, beta=self._uses_mask, alpha=self._scale)
        return torch.bmm(scores.softmax(-1), self._values).view(size).to(queries.dtype)


class _Prefill:
    def __init__(self, span: Span, cache: KvCache, compute: torch.dtype) -> None:
        self.rows = slice(span.first, span.first + span.num_rows)
        self._gather = _Gather(span.table[None], cache, compute)
        self._compute = compute
        length = span.start + span.num_rows
        self._keys, self._values = self._gather.memory[:, None, :, :length]
        self._mask = None
        if span.start:
            beyond = torch.ones(span.num_rows, length, dtype=torch.bool).triu_(span.start + 1)
            self._mask = torch.zeros(beyond.shape, dtype=compute).masked_fill_(beyond, -math.inf)

    def attend(self, layer: int, queries: torch.Tensor) -> torch.Tensor:
        """Map [num_rows, heads, head_dim] to the same."""
        self._gather(layer)
        mixed = scaled_dot_product_attention(
            queries.transpose(0, 1)[None].to(self._compute),
            self._keys,
            self._values,
            attn_mask=self._mask,
            is_causal=self._mask is None,
            enable_gqa=True,
        )
        return mixed[0].transpose(0, 1).to(queries.dtype)
