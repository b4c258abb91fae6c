"""Compile every kernel for a Hopper GPU, where there is none: python -m tests.gpu.compiled_kernels

What a kernel is compiled for follows from the arguments it is launched with, so a small model computes steps of each
kind; instead of being launched, kernels are compiled. Prints the names of the compiled, a line each.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from workers.gpu import launch as launching

HOPPER = GPUTarget("cuda", 90, 32)
OPTIONS = ("num_warps", "num_stages")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compilers:
    """Stands for `launch`: has what is launched compiled, once for each kind of arguments."""

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self.compiled: dict[tuple[object, ...], Any] = {}

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        options["launch_pdl"] = constants.get("EARLY", False)
        types = [_type_of(arg) for arg in args]
        key = (kernel.__name__, *types, *constants.items(), *options.items())
        if key in self.compiled:
            return
        signature = dict(zip(kernel.arg_names, types, strict=False)) | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): c for name, c in constants.items()})
        self.compiled[key] = self._pool.submit(triton.compile, source, target=HOPPER, options=options)


def _type_of(arg: object) -> str:
    if isinstance(arg, torch.Tensor):
        return TYPES[arg.dtype]
    return "i32" if isinstance(arg, int) else "fp32"


def main() -> int:
    with ThreadPoolExecutor(2) as pool:
        compilers = Compilers(pool)
        launching.launch = compilers  # type: ignore[assignment]
        from tests.gpu.small_steps import compute_steps

        compute_steps()
        for key, compiling in compilers.compiled.items():
            compiling.result()
            sys.stdout.write(f"{key[0]}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
