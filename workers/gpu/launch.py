"""Launches Triton kernels without binding their arguments anew each time. Needs triton.

    launch(kernel, grid, *args, **constants)        instead of  kernel[grid](*args, **constants)

Triton finds out for each launch what its arguments are, which takes the host 30 µs, four times as long as the launch. A
kernel is compiled for the types of its arguments, for which pointers and numbers are multiples of 16, and which numbers
are 1: where all that is as it was before, so is the compiled kernel. Positional arguments come before all constants, as
kernels here declare them.

A kernel with ``EARLY=True`` begins while the one before it ends, where the GPU can do that (CUDA's programmatic
dependent launch): each of its programs calls ``gdc_wait`` and reads nothing but weights before. If the kernel before it
calls ``gdc_launch_dependents``, it begins as soon as there is room for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction

_LARGEST_INT32 = 2**31 - 1


class Launcher:
    """`stream` returns the stream that is current, as CUDA's number of it."""

    def __init__(self, stream: Callable[[], int]) -> None:
        self._stream = stream
        self._compiled: dict[tuple[object, ...], tuple[Any, tuple[object, ...]]] = {}
        """By what they were compiled for: kernels, and the constants behind their arguments."""

    def __call__(self, kernel: Any, grid: tuple[int, ...], *args: object, **constants: object) -> None:
        key: list[object] = [id(kernel), *constants.values()]  # whose own hash is that of its source
        values: list[object] = []
        for arg in args:
            if isinstance(arg, torch.Tensor):
                pointer = arg.data_ptr()
                values.append(pointer)  # a number is not looked up by the driver, as a tensor's address would be
                key.append(arg.dtype)
                key.append(pointer % 16)
            else:
                values.append(arg)
                key.append(_kind_of_number(arg))
        found = self._compiled.get(tuple(key))
        if found is None:
            if constants.get("EARLY"):
                constants |= {"launch_pdl": True} if can_begin_early() else {"EARLY": False}
            compiled = kernel[grid](*args, **constants)
            if isinstance(kernel, JITFunction):  # otherwise it is interpreted, and there is nothing to keep
                rest = tuple(constants[name] for name in kernel.arg_names[len(args) :])
                self._compiled[tuple(key)] = compiled, rest
            return
        compiled, rest = found
        width, height, depth = (*grid, 1, 1)[:3]
        compiled.run(
            width, height, depth, self._stream(), compiled.function, compiled.packed_metadata, None, None, None,
            *values, *rest,
        )  # fmt: skip


def can_begin_early() -> bool:
    """Whether kernels of this process can begin before those before them have ended."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


def _kind_of_number(number: object) -> object:
    """Return what a kernel is compiled for, of a number: nothing of one that is not whole."""
    if type(number) is not int:
        return type(number)
    return number == 1, number % 16 == 0, number > _LARGEST_INT32


def _current_stream() -> int:
    active = driver.active
    return int(active.get_current_stream(active.get_current_device()))


launch = Launcher(_current_stream)
"""One for all: kernels are a process's."""
