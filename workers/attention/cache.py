"""The memory of keys and values: a pool of blocks for every layer. Who holds which block is the `BlockPool`'s to know.

    [layer, 2, block, kv_head, block_size, head_dim]

A block's part of one head is contiguous, so gathering blocks in the order [sequence, head, block] gives dense keys
for a batched product without another copy.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence as Seq

import torch


class KvCache:
    def __init__(
        self, *, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        size = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
        # Anonymous memory is zero and costs nothing until it is written: a pool never used is never paid for.
        memory = mmap.mmap(-1, torch.Size(size).numel() * dtype.itemsize)
        self._pool = torch.frombuffer(memory, dtype=dtype).view(size)
        self.keys = tuple(layer[0] for layer in self._pool)
        """Per layer: [block, kv_head, block_size, head_dim]."""
        self.values = tuple(layer[1] for layer in self._pool)
        self.address = self._pool.data_ptr()
        self.num_blocks = num_blocks
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.head_dim = head_dim
        self.dtype = dtype

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy blocks (from, to), all of them read before any is written."""
        sources, targets = torch.tensor(pairs).unbind(1)
        self._pool[:, :, targets] = self._pool[:, :, sources]

    def clear(self, blocks: torch.Tensor) -> None:
        """Make `blocks` [n] zero. What a former holder left, a NaN perhaps, is masked when it is read, but masked
        positions are multiplied by zero and not skipped."""
        if len(blocks):
            self._pool[:, :, blocks] = 0

    def row_index(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return [rows * kv_heads]: for each row and head, where its key is in `keys[layer].view(-1, head_dim)`."""
        heads = torch.arange(self.num_kv_heads)
        return ((blocks[:, None] * self.num_kv_heads + heads) * self.block_size + offsets[:, None]).flatten()

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, each [rows, kv_heads, head_dim], at `row_index`."""
        self.keys[layer].view(-1, self.head_dim).index_copy_(0, index, keys.reshape(-1, self.head_dim))
        self.values[layer].view(-1, self.head_dim).index_copy_(0, index, values.reshape(-1, self.head_dim))


def bytes_per_block(*, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return what one block costs, all layers together."""
    return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize
