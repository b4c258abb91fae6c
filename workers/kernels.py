"""Matrix products with a constant weight, packed once: the only file that calls operators private to torch.

    "onednn"    weight reordered for oneDNN; bf16 where the CPU multiplies it, fp32 everywhere oneDNN is
    "fp16"      for bf16 on CPUs without it: the weight rounded to fp16, which is finer, and everything else in fp32.
                FBGEMM's, which chooses its instructions itself, whatever torch was told of the CPU.
    "widened"   where FBGEMM has no such product either: bf16 in and out, but the product in fp32 with the bf16 weights
                widened. Torch's own bf16 product is 10 to 50 times slower there. Same rounding as bf16 with fp32
                accumulation.
    "torch"     F.linear on the plain weight

`kernel_for` probes once per process and type what works here. Knows no layers and no adapters.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import torch
from torch.nn import functional

Matmul = Callable[[torch.Tensor], torch.Tensor]
"""Maps [rows, in] to [rows, out], both of the type that `activations` says."""

LARGEST_FP16 = 65504.0


def native_dtype() -> torch.dtype:
    """Return the fastest type of this CPU: bf16 where its instructions multiply it, else fp32."""
    return torch.bfloat16 if has_native_bf16() else torch.float32


@functools.cache
def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 (AVX512-BF16 or AMX) and torch makes use of it."""
    if not _is_onednn_exact(torch.bfloat16):
        return False
    supported = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe is not None and probe() for probe in supported)


@functools.cache
def kernel_for(dtype: torch.dtype) -> str:
    """Return the name of the kernel that `pack` uses for `dtype` on this machine."""
    if dtype is torch.bfloat16 and not has_native_bf16():
        return "fp16" if _is_fp16_exact() else "widened"
    return "onednn" if _is_onednn_exact(dtype) else "torch"


def activations(dtype: torch.dtype) -> torch.dtype:
    """Return the type of what products packed for `dtype` take and return."""
    return torch.float32 if kernel_for(dtype) == "fp16" else dtype


def fits_fp16(weight: torch.Tensor) -> bool:
    """Say whether fp16 has room for every number of `weight`."""
    lowest, highest = weight.aminmax()
    return max(-lowest.item(), highest.item()) <= LARGEST_FP16


def pack(weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> Matmul:
    """Return x -> x @ weight.T + bias for `dtype`; `weight` is [out, in] in fp32 and not kept."""
    kernel = kernel_for(dtype)
    if kernel == "fp16":
        return _fp16(weight, bias) if fits_fp16(weight) else pack(weight, bias, torch.float32)
    weight = weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if kernel == "widened":
        return _widened(pack(weight.float(), None if bias is None else bias.float(), torch.float32))
    return (
        _onednn(weight, bias) if kernel == "onednn" else functools.partial(functional.linear, weight=weight, bias=bias)
    )


def _onednn(weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    product = torch.ops.mkldnn._linear_pointwise.default

    def matmul(x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = product(x, packed, bias, "none", [], "")
        return y

    return matmul


def _fp16(weight: torch.Tensor, bias: torch.Tensor | None) -> Matmul:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        product: Matmul = torch.jit.script(_Fp16(weight, bias)).forward
    return product


class _Fp16(torch.nn.Module):
    """Compiled, as torch otherwise throws and catches exceptions while it looks at the packed weight: 20 microseconds
    for each product, more than one row of a small layer takes.

    FBGEMM leaves the upper halves of AVX registers in use, in every thread. Where torch's own operators are made of SSE
    instructions (ATEN_CPU_CAPABILITY=default) these then take up to 30 times as long, until somebody clears them: the
    copying of short rows, of which each thread has its part, costs 7 microseconds.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.contiguous(), bias)
        self.needs_clearing = torch.backends.cpu.get_cpu_capability() == "DEFAULT"
        self.rows, self.copied, self.order = _clearing_rows(torch.get_num_threads())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        if self.needs_clearing:
            torch.index_select(self.rows, 0, self.order, out=self.copied)
        return y


@functools.cache
def _clearing_rows(num_threads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return rows, as many again to copy them to, and their order: so many that torch divides them among all threads,
    and so short that the C library copies them with AVX registers, which it clears after that."""
    rows = torch.zeros(64 * num_threads, 512, dtype=torch.uint8)
    return rows, torch.empty_like(rows), torch.arange(len(rows))


def _widened(product: Matmul) -> Matmul:
    def matmul(x: torch.Tensor) -> torch.Tensor:
        return product(x.float()).to(torch.bfloat16)

    return matmul


@functools.cache
def _is_onednn_exact(dtype: torch.dtype) -> bool:
    """Whether oneDNN's packed product exists here and agrees with F.linear, with and without a bias."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator).to(dtype) for size in ((3, 32), (48, 32), (48,)))
    try:
        return all(
            torch.allclose(_onednn(weight, b)(x).float(), functional.linear(x, weight, b).float(), rtol=2e-2, atol=2e-2)
            for b in (None, bias)
        )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


@functools.cache
def _is_fp16_exact() -> bool:
    """Whether FBGEMM's product exists here and is that of F.linear with the rounded weight, with and without a bias."""
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((7, 40), (56, 40), (56,)))
    rounded = weight.half().float()
    try:
        return all(
            torch.allclose(_fp16(weight, b)(x), functional.linear(x, rounded, b), rtol=1e-4, atol=1e-4)
            for b in (None, bias)
        )
    except (RuntimeError, AttributeError, NotImplementedError, OSError):  # OSError: no source to compile
        return False
