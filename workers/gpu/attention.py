"""Attention of rows of one token each over their blocks, by one kernel a layer. Needs triton.

It takes queries, keys and values as the projection left them: norms and turns the heads, stores the new key and value,
attends, and merges. The context of a row is split among programs (flash-decoding, Dao et al. 2023); the one that ends
last merges what all have left.

    context   0 ........ per ........ 2 per ........ position
    split     |--- 0 ----|---- 1 -----|----- 2 ------|      the last one has the row's own key and value, at hand
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.launch import launch
from workers.gpu.layout import Rows, StepMemory
from workers.gpu.rows import Heads, rotated

MAX_SPLITS = 32
NUM_PROGRAMS = 1024
"""As many programs as keep the memory of an H200 busy."""


@triton.jit
def _merge(  # type: ignore[no-untyped-def]
    parts, sums, out, num_parts, GROUP: tl.constexpr, FEW: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write to `out` [GROUP, DIM] the mean of `parts` [num_parts, GROUP, DIM] by their weights, whose logarithms are in
    `sums`. Others have written them, past this processor's cache."""
    d, f, u = tl.arange(0, WIDE), tl.arange(0, FEW), tl.arange(0, 8)
    is_dim, is_few = d < DIM, f < GROUP
    highest = tl.full([FEW], float("-inf"), tl.float32)
    total = tl.zeros([FEW], tl.float32)
    merged = tl.zeros([FEW, WIDE], tl.float32)
    for start in range(0, num_parts, 8):
        at = start + u
        is_there = (at < num_parts)[:, None] & is_few[None, :]
        place = at[:, None] * GROUP + f[None, :]
        e = tl.load(sums + place, mask=is_there, other=float("-inf"), cache_modifier=".cg")
        now = tl.where(is_few, tl.maximum(highest, tl.max(e, 0)), 0.0)
        weights = tl.exp2(e - now[None, :])
        shrink = tl.exp2(highest - now)
        some = tl.load(
            parts + place[:, :, None] * DIM + d[None, None, :],
            mask=is_there[:, :, None] & is_dim[None, None, :], other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        merged = merged * shrink[:, None] + tl.sum(some * weights[:, :, None], 0)
        total = total * shrink + tl.sum(weights, 0)
        highest = now
    merged = merged / tl.where(is_few, total, 1.0)[:, None]
    is_inside = is_few[:, None] & is_dim[None, :]
    tl.store(out + f[:, None] * DIM + d[None, :], merged.to(out.dtype.element_ty), mask=is_inside)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    qkv, keys, values, tables, slots, positions, cos, sin, q_weight, k_weight, parts, sums, arrivals, out,
    table_stride, scale, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, MANY: tl.constexpr, FEW: tl.constexpr,
    DIM: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
    HAS_NORM: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    kv_head, row, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    num_splits = tl.num_programs(2)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    per = tl.cdiv(tl.cdiv(position + 1, num_splits), TILE) * TILE
    num_used = tl.cdiv(position + 1, per)
    first = split * per
    if split < num_used:
        d, g = tl.arange(0, WIDE), tl.arange(0, MANY)
        is_dim, is_head = d < DIM, g < GROUP
        dtype = keys.dtype.element_ty
        here = qkv + row * (HEADS + 2 * KV_HEADS) * DIM
        q = rotated(
            here + kv_head * GROUP * DIM, q_weight, cos, sin, position, is_head, eps, MANY, DIM, WIDE, HAS_NORM
        ).to(dtype)
        own_key = rotated(
            here + (HEADS + kv_head) * DIM, k_weight, cos, sin, position, tl.arange(0, 1) == 0, eps, 1, DIM, WIDE,
            HAS_NORM,
        ).to(dtype)  # fmt: skip
        own_value = tl.load(here + (HEADS + KV_HEADS + kv_head) * DIM + d, mask=is_dim, other=0.0)
        is_last = split == num_used - 1
        table = tables + slot * table_stride
        block = tl.load(table + position // BLOCK).to(tl.int64)
        place = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head) * DIM + d[None, :]
        is_stored = d[None, :] < tl.where(is_last, DIM, 0)
        tl.store(keys + place, own_key, mask=is_stored)
        tl.store(values + place, own_value[None, :].to(dtype), mask=is_stored)

        own = tl.sum(q.to(tl.float32) * own_key.to(tl.float32), 1) * scale
        most = tl.where(is_last, own, float("-inf"))
        total = tl.where(is_last, tl.full([MANY], 1.0, tl.float32), 0.0)
        mixed = tl.where(is_last, own_value.to(dtype).to(tl.float32), 0.0)[None, :] + tl.zeros([MANY, WIDE], tl.float32)
        t = tl.arange(0, TILE)
        end = tl.minimum(first + per, position)
        for start in range(first, end, TILE):
            at = start + t
            is_past = at < end
            blocks = tl.load(table + at // BLOCK, mask=is_past, other=0).to(tl.int64)
            offset = ((blocks * BLOCK + at % BLOCK) * KV_HEADS + kv_head) * DIM
            k = tl.load(keys + offset[None, :] + d[:, None], mask=is_past[None, :] & is_dim[:, None], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            scores = tl.where(is_past[None, :], scores, float("-inf"))
            now = tl.maximum(most, tl.max(scores, 1))
            shrink = tl.exp2(most - now)
            weights = tl.exp2(scores - now[:, None])
            v = tl.load(values + offset[:, None] + d[None, :], mask=is_past[:, None] & is_dim[None, :], other=0.0)
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(dtype), v, input_precision=PRECISION)
            most = now
        mixed = mixed / total[:, None]
        target = out + (row * HEADS + kv_head * GROUP) * DIM
        is_inside = is_head[:, None] & is_dim[None, :]
        if num_used == 1:
            tl.store(target + g[:, None] * DIM + d[None, :], mixed.to(out.dtype.element_ty), mask=is_inside)
        else:
            pair = row * KV_HEADS + kv_head
            part = (pair * num_splits + split) * GROUP + g
            tl.store(parts + part[:, None] * DIM + d[None, :], mixed, mask=is_inside)
            tl.store(sums + part, most + tl.log2(total), mask=is_head)
            tl.debug_barrier()
            num_before = tl.atomic_add(arrivals + pair, 1, sem="acq_rel")
            if num_before == num_used - 1:
                tl.debug_barrier()
                tl.store(arrivals + pair, 0)
                first_part = pair * num_splits * GROUP
                _merge(
                    parts + first_part * DIM, sums + first_part, target, num_used, GROUP, FEW, DIM, WIDE,
                )  # fmt: skip


class DecodeAttention:
    """Owns the memory that splits of a step leave their parts in; one step at a time."""

    def __init__(self, heads: Heads, max_rows: int, device: torch.device) -> None:
        self._heads = heads
        size = max(rows * splits_of(rows, heads.num_kv) for rows in range(1, max_rows + 1)) * heads.num
        self._parts = torch.empty(size * heads.dim, dtype=torch.float32, device=device)
        self._sums = torch.empty(size, dtype=torch.float32, device=device)
        self._arrivals = torch.zeros(max_rows * heads.num_kv, dtype=torch.int32, device=device)

    def __call__(
        self, qkv: torch.Tensor, norms: tuple[torch.Tensor, torch.Tensor] | None, keys: torch.Tensor,
        values: torch.Tensor, memory: StepMemory, rows: Rows, out: torch.Tensor,
    ) -> None:  # fmt: skip
        """Store the keys and values of `qkv` [rows, ...] and write what its queries attend to, [rows, heads * dim]."""
        heads, num_rows = self._heads, len(qkv)
        q_norm, k_norm = norms or (heads.cos, heads.cos)
        group, splits = heads.num // heads.num_kv, splits_of(num_rows, heads.num_kv)
        tile, num_warps = self._tile(num_rows)
        launch(
            _attend, (heads.num_kv, num_rows, splits),  # heads of a row at once: their keys lie side by side
            qkv, keys, values, memory.tables, rows.slots, rows.positions, heads.cos, heads.sin, q_norm, k_norm,
            self._parts, self._sums, self._arrivals, out,
            memory.tables.stride(0), heads.dim**-0.5 * LOG2_E, heads.eps,
            HEADS=heads.num, KV_HEADS=heads.num_kv, GROUP=group, MANY=max(16, triton.next_power_of_2(group)),
            FEW=triton.next_power_of_2(group), DIM=heads.dim, WIDE=triton.next_power_of_2(heads.dim),
            BLOCK=memory.block_size, TILE=tile, HAS_NORM=norms is not None, EARLY=num_rows == 1,
            PRECISION="ieee" if qkv.dtype is torch.float32 else "tf32", num_warps=num_warps, num_stages=3,
        )  # fmt: skip

    def sizes_of_kinds(self, max_rows: int) -> list[int]:
        """Return a number of rows for each of the kernels that up to `max_rows` rows are computed with."""
        least: dict[object, int] = {}
        for num_rows in range(1, max_rows + 1):
            least.setdefault((num_rows == 1, self._tile(num_rows)), num_rows)
        return list(least.values())

    def _tile(self, num_rows: int) -> tuple[int, int]:
        heads = self._heads
        return tile_of(num_rows * heads.num_kv, heads.num // heads.num_kv, heads.dim)


LOG2_E = 1.4426950408889634


def tile_of(num_pairs: int, group: int, dim: int) -> tuple[int, int]:
    """Return how many keys a program reads at once, and its warps: the fastest of eight on an H200 over contexts of 168
    to 2,048, by rows times key heads, by the queries of a key head and by their size."""
    if dim <= 64 and num_pairs >= 768:
        return 64, 1
    if group >= 4 and 512 <= num_pairs < 1024:
        return 64, 2
    return 32, 1


def splits_of(num_rows: int, num_kv_heads: int) -> int:
    """Return among how many programs the context of each row and head is split: a power of two."""
    wanted = max(1, NUM_PROGRAMS // (num_rows * num_kv_heads))
    return min(MAX_SPLITS, 1 << (wanted.bit_length() - 1))
