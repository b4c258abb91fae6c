"""What a device knows of the sequences in its slots, and which rows a step computes: tensors, no kernels.

memory   [ tokens: slot x position | tables: slot x place ]     int32, one tensor, so that one copy changes all
                              the last slot is the spare one, which padding uses: token 0, the spare block
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """Each row is the token at one position of one slot."""

    slots: torch.Tensor
    """[rows] int32, as `positions`."""
    positions: torch.Tensor

    def first(self, count: int) -> Rows:
        return Rows(self.slots[:count], self.positions[:count])


class StepMemory:
    """Tokens and block tables of `num_slots` slots and the spare one; blocks that were never named are the spare block,
    whose number is `num_blocks`."""

    def __init__(
        self, *, num_slots: int, max_tokens: int, block_size: int, num_blocks: int, device: torch.device
    ) -> None:
        self.block_size = block_size
        self.spare_slot = num_slots
        self.max_blocks = -(-(max_tokens + 1) // block_size)
        self.max_tokens = self.max_blocks * block_size
        num_tokens, num_places = (num_slots + 1) * self.max_tokens, (num_slots + 1) * self.max_blocks
        self.cells = torch.zeros(num_tokens + num_places, dtype=torch.int32, device=device)
        """Everything, for those who write."""
        self.tokens = self.cells[:num_tokens].view(num_slots + 1, self.max_tokens)
        self.tables = self.cells[num_tokens:].view(num_slots + 1, self.max_blocks)
        self.tables.fill_(num_blocks)

    def token_cell(self, slot: int, position: int) -> int:
        """Return the place in `cells` of ``tokens[slot, position]``."""
        return slot * self.max_tokens + position

    def table_cell(self, slot: int, place: int) -> int:
        """Return the place in `cells` of ``tables[slot, place]``."""
        return self.tokens.numel() + slot * self.max_blocks + place


class BlockCache:
    """Keys and values in blocks: a tensor for all layers, and the spare block behind the others."""

    def __init__(
        self, *, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        self.num_blocks = num_blocks
        # Zeros, not what was there before: flash kernels multiply what is masked by zero, and a NaN stays one.
        self.pool = torch.zeros(
            num_layers, 2, num_blocks + 1, block_size, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        self.layers = tuple((layer[0], layer[1]) for layer in self.pool)
        """Of each layer keys and values, [block, place, kv_head, head_dim]."""

    def copy(self, sources: torch.Tensor, targets: torch.Tensor) -> None:
        """Copy blocks, all read before any is written."""
        self.pool[:, :, targets] = self.pool[:, :, sources]
