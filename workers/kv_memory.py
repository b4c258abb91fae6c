"""The memory of keys and values: a pool of blocks for every layer. Who holds which block is the `BlockPool`'s to know.

    [layer, 2, block, kv_head, block_size, head_dim]

Needs numpy alone: the C library is given the address, torch looks at the same bytes (`attention/cache.py`).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence as Seq
from typing import Any

import numpy as np
import numpy.typing as npt


class KvMemory:
    def __init__(
        self,
        *,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: npt.DTypeLike,
    ) -> None:
        """`dtype` is that of the numbers, or any of its size where numpy has none, as for bf16."""
        size = (num_layers, 2, num_blocks, num_kv_heads, block_size, head_dim)
        # Anonymous memory is zero and costs nothing until it is written: a pool never used is never paid for.
        memory = mmap.mmap(-1, math.prod(size) * np.dtype(dtype).itemsize)
        self.pool: npt.NDArray[Any] = np.frombuffer(memory, dtype=dtype).reshape(size)
        self.address = self.pool.ctypes.data
        self.num_blocks = num_blocks
        self.num_kv_heads = num_kv_heads
        self.block_size = block_size
        self.head_dim = head_dim

    def copy(self, pairs: Seq[tuple[int, int]]) -> None:
        """Copy blocks (from, to), all of them read before any is written."""
        sources, targets = zip(*pairs, strict=True)
        self.pool[:, :, targets] = self.pool[:, :, sources]


def bytes_per_block(*, num_layers: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: npt.DTypeLike) -> int:
    """Return what one block costs, all layers together."""
    return num_layers * 2 * num_kv_heads * block_size * head_dim * np.dtype(dtype).itemsize
