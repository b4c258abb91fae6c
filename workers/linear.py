"""A projection of the model: one constant weight, packed at load, and the adapters that change its result.

Every matrix product of a model goes through `Linear`, so that packing, quantisation and adapters have one place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from workers import kernels

Adapter = Callable[[torch.Tensor], torch.Tensor]
"""What an adapter adds to a projection: maps the input [rows, in] to a change of the output [rows, out]."""

NO_ADAPTERS: Mapping[str, torch.Tensor] = {}


class Linear:
    """x -> x @ weight.T + bias. `weight` is [out, in] and `bias` [out], both fp32; neither is kept unpacked."""

    __slots__ = ("_matmul", "adapters")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        self._matmul = kernels.pack(weight, bias, dtype)
        self.adapters: dict[str, Adapter] = {}
        """By name. A name that a projection lacks leaves its result as it is."""

    def __call__(self, x: torch.Tensor, adapter_rows: Mapping[str, torch.Tensor] = NO_ADAPTERS) -> torch.Tensor:
        """Map [rows, in] to [rows, out]. `adapter_rows`: by name of the adapter, the rows that it changes."""
        y = self._matmul(x)
        for name, rows in adapter_rows.items():
            adapter = self.adapters.get(name)
            if adapter is not None:
                y.index_add_(0, rows, adapter(x[rows]).to(y.dtype))
        return y
