"""Products of one row with a weight, and what stands before and behind them, by one kernel each. Needs triton.

One row is bound by reading the weight once and by the number of kernels that must be started. So norm, gate and
residual are part of the product, and the weight is on its way before the row is there:

    project(x, w)                        x @ w.T
    project(x, w, norm=n)                norm(x) @ w.T
    project(x, w, norm=n, is_gated=True) silu(gate) * up, of norm(x) and w = [gate; up]
    project(x, w, added_to=r)            r += x @ w.T

More rows, and the head's many outputs, are faster with cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from workers.gpu.launch import launch


@triton.jit
def _project(  # type: ignore[no-untyped-def]
    x, weight, bias, norm, out, num_out, num_in, eps,
    TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, HAS_NORM: tl.constexpr, IS_GATED: tl.constexpr,
    ADDS: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    is_out = n < num_out
    k = tl.arange(0, TILE_IN)
    lines = weight + n.to(tl.int64)[:, None] * num_in
    up_lines = weight + (n.to(tl.int64) + num_out)[:, None] * num_in
    # The first tile of the weight is on its way while the kernel before this one ends.
    is_in = k < num_in
    is_inside = is_out[:, None] & is_in[None, :]
    first = tl.load(lines + k[None, :], mask=is_inside, other=0.0)
    up_first = tl.load(up_lines + k[None, :], mask=is_inside, other=0.0) if IS_GATED else first
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(x + k, mask=is_in, other=0.0).to(tl.float32)
    squares = values * values
    if HAS_NORM:
        values = values * tl.load(norm + k, mask=is_in, other=0.0).to(tl.float32)
    products = values[None, :] * first.to(tl.float32)
    up_products = values[None, :] * up_first.to(tl.float32)
    for start in tl.range(TILE_IN, num_in, TILE_IN, num_stages=STAGES):
        at = start + k
        is_in = at < num_in
        is_inside = is_out[:, None] & is_in[None, :]
        w = tl.load(lines + at[None, :], mask=is_inside, other=0.0).to(tl.float32)
        values = tl.load(x + at, mask=is_in, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += values * values
            values = values * tl.load(norm + at, mask=is_in, other=0.0).to(tl.float32)
        products += values[None, :] * w
        if IS_GATED:
            w = tl.load(up_lines + at[None, :], mask=is_inside, other=0.0).to(tl.float32)
            up_products += values[None, :] * w
    y, up = tl.sum(products, 1), tl.sum(up_products, 1)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(squares, 0) / num_in + eps)
        y, up = y * scale, up * scale
    if HAS_BIAS:
        y += tl.load(bias + n, mask=is_out, other=0.0).to(tl.float32)
        if IS_GATED:
            up += tl.load(bias + num_out + n, mask=is_out, other=0.0).to(tl.float32)
    if IS_GATED:
        y = y * tl.sigmoid(y) * up
    if ADDS:
        y += tl.load(out + n, mask=is_out, other=0.0)
    tl.store(out + n, y.to(out.dtype.element_ty), mask=is_out)


def project(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    is_gated: bool = False,
    added_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return [1, out] in the type of the weight, or `added_to`, which is changed.

    `x` is [1, in]; `weight` [out, in], or [2 * out, in] if `is_gated`.
    """
    num_in, num_out = x.shape[1], len(weight) // (2 if is_gated else 1)
    out = torch.empty(1, num_out, dtype=weight.dtype, device=x.device) if added_to is None else added_to
    tile_out, tile_in, stages = tiles_of(num_out, num_in, is_gated)
    launch(
        _project, (triton.cdiv(num_out, tile_out),),
        x, weight, weight if bias is None else bias, weight if norm is None else norm, out, num_out, num_in, eps,
        TILE_OUT=tile_out, TILE_IN=tile_in, HAS_NORM=norm is not None, IS_GATED=is_gated,
        ADDS=added_to is not None, HAS_BIAS=bias is not None, STAGES=stages, EARLY=True, num_warps=4,
    )  # fmt: skip
    return out


def tiles_of(num_out: int, num_in: int, is_gated: bool) -> tuple[int, int, int]:
    """Return the outputs and the inputs of a program's tile, and how many tiles are on their way at once: the fastest
    of a dozen on an H200, by the size of the product."""
    if num_in < 1024:
        return 4, min(1024, triton.next_power_of_2(num_in)), 1
    if num_in == 1024:
        return 4, 512, 1
    if is_gated:
        return 4, 1024, 3
    return (8 if num_out >= 4096 and num_in <= 4096 else 4), 512, 3
