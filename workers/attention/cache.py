"""Keys and values as torch sees them: tensors over a `KvMemory`.

A block's part of one head is contiguous, so gathering blocks in the order [sequence, head, block] gives dense keys
for a batched product without another copy.
"""

from __future__ import annotations

import torch

from workers.kv_memory import KvMemory


class KvCache(KvMemory):
    def __init__(
        self, *, num_layers: int, num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__(
            num_layers=num_layers,
            num_blocks=num_blocks,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            head_dim=head_dim,
            dtype=f"u{dtype.itemsize}",
        )
        self.dtype = dtype
        tensors = torch.frombuffer(self.pool.reshape(-1), dtype=dtype).view(self.pool.shape)
        self.keys = tuple(layer[0] for layer in tensors)
        """Per layer: [block, kv_head, block_size, head_dim]."""
        self.values = tuple(layer[1] for layer in tensors)
        self.blocks = tuple(layer.view(-1, block_size * head_dim) for layer in tensors)
        """Per layer: [2 * block * kv_head, block_size * head_dim], the keys of all blocks and then the values."""
        self._key_rows = tuple(store.view(-1, head_dim) for store in self.keys)
        self._value_rows = tuple(store.view(-1, head_dim) for store in self.values)
        self._tensors = tensors

    def clear(self, blocks: torch.Tensor) -> None:
        """Make `blocks` [n] zero. What a former holder left, a NaN perhaps, is masked when it is read, but masked
        positions are multiplied by zero and not skipped."""
        if len(blocks):
            self._tensors[:, :, blocks] = 0

    def row_index(self, blocks: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        """Return [rows * kv_heads]: for each row and head, where its key is in `keys[layer].view(-1, head_dim)`."""
        heads = torch.arange(self.num_kv_heads)
        return ((blocks[:, None] * self.num_kv_heads + heads) * self.block_size + offsets[:, None]).flatten()

    def write(self, layer: int, index: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values, each [rows, kv_heads, head_dim], at `row_index`."""
        self._key_rows[layer].index_copy_(0, index, keys.reshape(-1, self.head_dim))
        self._value_rows[layer].index_copy_(0, index, values.reshape(-1, self.head_dim))
