"""Kernels over the rows of a step, each of them all that lies between two matrix products. Needs triton.

    embed         x = embedding[tokens[slot, position]], y = norm(x)
    add_norm      x += change; y = norm(x)
    gate          y = silu(gate) * up
    rotate_store  queries normed and rotated; keys likewise into their blocks, values too

x is fp32 whatever the type of the weights, everything is computed in fp32 and rounded once, when it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.launch import launch
from workers.gpu.layout import Rows, StepMemory


@triton.jit
def _normed(x, weight, columns, is_inside, num_columns, eps):  # type: ignore[no-untyped-def]
    scale = tl.rsqrt(tl.sum(x * x, 0) / num_columns + eps)
    return x * scale * tl.load(weight + columns, mask=is_inside, other=0.0).to(tl.float32)


@triton.jit
def _embed(  # type: ignore[no-untyped-def]
    tokens, slots, positions, embedding, weight, x, y, slot_stride, vocab_size, width, eps,
    WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    token = tl.load(tokens + slot * slot_stride + position)
    token = tl.minimum(tl.maximum(token, 0), vocab_size - 1).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_inside = columns < width
    values = tl.load(embedding + token * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(x + row * width + columns, values, mask=is_inside)
    if HAS_NORM:
        values = _normed(values, weight, columns, is_inside, width, eps)
        tl.store(y + row * width + columns, values.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def _add_norm(x, change, weight, y, width, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    is_inside = columns < width
    values = tl.load(x + row * width + columns, mask=is_inside, other=0.0)
    values += tl.load(change + row * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(x + row * width + columns, values, mask=is_inside)
    values = _normed(values, weight, columns, is_inside, width, eps)
    tl.store(y + row * width + columns, values.to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def _gate(both, y, width, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    is_inside = columns < width
    gate = tl.load(both + row * 2 * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(both + (row * 2 + 1) * width + columns, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + columns, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=is_inside)


@triton.jit
def rotated(  # type: ignore[no-untyped-def]
    heads, weight, cos, sin, position, is_there, eps, COUNT: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Return the heads at `heads` [COUNT, DIM], normed and turned by the angles of `position`, in fp32 [COUNT, WIDE].

    Each pair (i, i + DIM / 2) is turned by its angle: x cos - y sin, y cos + x sin.
    """
    d = tl.arange(0, WIDE)
    half = DIM // 2
    other = tl.where(d < half, d + half, d - half)
    place = tl.arange(0, COUNT)[:, None] * DIM
    is_inside = is_there[:, None] & (d < DIM)[None, :]
    own = tl.load(heads + place + d[None, :], mask=is_inside, other=0.0).to(tl.float32)
    swapped = tl.load(heads + place + other[None, :], mask=is_inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(own * own, 1) / DIM + eps)[:, None]
        own = own * scale * tl.load(weight + d, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
        swapped = swapped * scale * tl.load(weight + other, mask=d < DIM, other=0.0).to(tl.float32)[None, :]
    pair = tl.where(d < half, d, d - half)
    c = tl.load(cos + position * half + pair, mask=d < DIM, other=0.0)
    s = tl.load(sin + position * half + pair, mask=d < DIM, other=0.0)
    return own * c[None, :] + swapped * tl.where(d < half, -s, s)[None, :]


@triton.jit
def _rotate_store(  # type: ignore[no-untyped-def]
    qkv, queries, keys, values, tables, slots, positions, cos, sin, q_weight, k_weight, table_stride, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, MANY: tl.constexpr, KV_MANY: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, position = tl.load(slots + row).to(tl.int64), tl.load(positions + row)
    block = tl.load(tables + slot * table_stride + position // BLOCK).to(tl.int64)
    d, head, kv_head = tl.arange(0, WIDE), tl.arange(0, MANY), tl.arange(0, KV_MANY)
    here = qkv + row * (HEADS + 2 * KV_HEADS) * DIM
    turned = rotated(here, q_weight, cos, sin, position, head < HEADS, eps, MANY, DIM, WIDE, HAS_NORM)
    is_inside = (head < HEADS)[:, None] & (d < DIM)[None, :]
    place = (row * HEADS + head)[:, None] * DIM + d[None, :]
    tl.store(queries + place, turned.to(queries.dtype.element_ty), mask=is_inside)
    is_there = kv_head < KV_HEADS
    turned = rotated(here + HEADS * DIM, k_weight, cos, sin, position, is_there, eps, KV_MANY, DIM, WIDE, HAS_NORM)
    is_inside = is_there[:, None] & (d < DIM)[None, :]
    place = ((block * BLOCK + position % BLOCK) * KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
    tl.store(keys + place, turned.to(keys.dtype.element_ty), mask=is_inside)
    source = (HEADS + KV_HEADS + kv_head)[:, None] * DIM + d[None, :]
    tl.store(values + place, tl.load(here + source, mask=is_inside, other=0.0), mask=is_inside)


@dataclass(frozen=True, slots=True)
class Heads:
    """What is done to the heads of a layer before they attend."""

    num: int
    num_kv: int
    dim: int
    eps: float
    cos: torch.Tensor
    """[positions, dim / 2] fp32, as `sin`."""
    sin: torch.Tensor

    @property
    def size(self) -> int:
        """The numbers of a row's queries, keys and values."""
        return (self.num + 2 * self.num_kv) * self.dim


def embed(
    memory: StepMemory,
    rows: Rows,
    embedding: torch.Tensor,
    x: torch.Tensor,
    norm: torch.Tensor,
    y: torch.Tensor | None,
    eps: float,
) -> None:
    """Look the tokens of `rows` up: write ``x`` [rows, hidden] fp32 and, if there is one, `y` = norm(x)."""
    vocab_size, width = embedding.shape
    launch(
        _embed, (len(x),),
        memory.tokens, rows.slots, rows.positions, embedding, norm, x, x if y is None else y,
        memory.tokens.stride(0), vocab_size, width, eps,
        WIDTH=triton.next_power_of_2(width), HAS_NORM=y is not None, EARLY=y is None, num_warps=_warps(width),
    )  # fmt: skip


def add_norm(x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, y: torch.Tensor, eps: float) -> torch.Tensor:
    """x += change, both [rows, hidden]; return `y`, which becomes norm(x)."""
    width = x.shape[1]
    launch(
        _add_norm,
        (len(x),),
        x,
        change,
        weight,
        y,
        width,
        eps,
        WIDTH=triton.next_power_of_2(width),
        num_warps=_warps(width),
    )
    return y


def gate(both: torch.Tensor) -> torch.Tensor:
    """Map [rows, 2 * ffn], gate and up, to [rows, ffn]."""
    num_rows, width = both.shape[0], both.shape[1] // 2
    y = torch.empty(num_rows, width, dtype=both.dtype, device=both.device)
    size = min(1024, triton.next_power_of_2(width))
    launch(_gate, (num_rows, triton.cdiv(width, size)), both, y, width, WIDTH=size, num_warps=4)
    return y


def rotate_store(
    qkv: torch.Tensor, heads: Heads, norms: tuple[torch.Tensor, torch.Tensor] | None, keys: torch.Tensor,
    values: torch.Tensor, memory: StepMemory, rows: Rows,
) -> torch.Tensor:  # fmt: skip
    """Return the queries [rows, heads, dim] of `qkv` [rows, ...], and store its keys and values in their blocks."""
    num_rows = len(qkv)
    queries = torch.empty(num_rows, heads.num, heads.dim, dtype=qkv.dtype, device=qkv.device)
    q_norm, k_norm = norms or (heads.cos, heads.cos)
    launch(
        _rotate_store, (num_rows,),
        qkv, queries, keys, values, memory.tables, rows.slots, rows.positions, heads.cos, heads.sin, q_norm, k_norm,
        memory.tables.stride(0), heads.eps,
        HEADS=heads.num, KV_HEADS=heads.num_kv, MANY=triton.next_power_of_2(heads.num),
        KV_MANY=triton.next_power_of_2(heads.num_kv), DIM=heads.dim, WIDE=triton.next_power_of_2(heads.dim),
        BLOCK=memory.block_size, HAS_NORM=norms is not None, num_warps=1,
    )  # fmt: skip
    return queries


def _warps(width: int) -> int:
    return 4 if width <= 2048 else 8
