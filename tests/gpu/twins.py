"""What the kernels compute, in torch: slow and plain. And rows of slots to compute it for."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm

from workers.gpu.layout import BlockCache, Rows, StepMemory
from workers.gpu.rows import Heads

EPS = 1e-5
BLOCK_SIZE = 4
Norms = tuple[torch.Tensor, torch.Tensor]


class TableOfRows:
    """Rows (slot, position) of up to three slots, whose blocks are in no order."""

    def __init__(self, device: torch.device, rows: list[tuple[int, int]], max_tokens: int = 30) -> None:
        blocks_each = (max_tokens + BLOCK_SIZE) // BLOCK_SIZE
        self.num_blocks = 3 * blocks_each
        self.memory = StepMemory(
            num_slots=3, max_tokens=max_tokens, block_size=BLOCK_SIZE, num_blocks=self.num_blocks, device=device
        )
        order = torch.randperm(self.num_blocks, device=device).int().view(3, blocks_each)
        self.memory.tables[:3, :blocks_each] = order[:, : self.memory.max_blocks]
        slots, positions = (torch.tensor(own, dtype=torch.int32, device=device) for own in zip(*rows, strict=True))
        self.rows = Rows(slots, positions)

    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the block of each row and its place in there."""
        slots, positions = self.rows.slots.long(), self.rows.positions.long()
        return self.memory.tables[slots, positions // BLOCK_SIZE].long(), positions % BLOCK_SIZE

    def cache(self, num_kv_heads: int, dim: int, dtype: torch.dtype) -> BlockCache:
        cache = BlockCache(
            num_layers=1,
            num_blocks=self.num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=num_kv_heads,
            head_dim=dim,
            dtype=dtype,
            device=self.memory.cells.device,
        )
        cache.pool.normal_()
        return cache

    def context(self, store: torch.Tensor, row: int) -> torch.Tensor:
        """Return [tokens, kv_heads, dim]: what `row` attends to, of keys or values."""
        length = int(self.rows.positions[row]) + 1
        table = self.memory.tables[int(self.rows.slots[row]), : -(-length // BLOCK_SIZE)].long()
        return store[table].flatten(0, 1)[:length].float()


def heads_of(device: torch.device, *, num: int, num_kv: int, dim: int, max_tokens: int = 400) -> Heads:
    angles = torch.arange(max_tokens, device=device)[:, None] * 100.0 ** -torch.linspace(0, 1, dim // 2, device=device)
    return Heads(num, num_kv, dim, EPS, angles.cos(), angles.sin())


def norms_of(device: torch.device, dim: int) -> Norms:
    return torch.rand(dim, device=device) + 0.5, torch.rand(dim, device=device) + 0.5


def rotated(
    qkv: torch.Tensor, heads: Heads, norms: Norms | None, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries, keys and values, each [rows, heads, dim] in fp32."""
    sizes = (heads.num, heads.num_kv, heads.num_kv)
    queries, keys, values = qkv.float().view(len(qkv), -1, heads.dim).split(sizes, 1)
    if norms is not None:
        queries, keys = (
            rms_norm(own, (heads.dim,), norm, EPS) for own, norm in zip((queries, keys), norms, strict=True)
        )
    cos, sin = (angles[positions.long()][:, None] for angles in (heads.cos, heads.sin))

    def turned(own: torch.Tensor) -> torch.Tensor:
        left, right = own.chunk(2, -1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    return turned(queries), turned(keys), values
