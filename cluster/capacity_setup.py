"""How an engine would compute a model under a configuration: which weights, products and cache `octavo plan` is about.

Reads the checkpoint's shape and one of its matrices, which stands for all, and packs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.capacity import BF16, FP32, INT4, INT8, WeightFormat, has_groups
from workers import kernels
from workers.config import EngineConfig
from workers.loading import choose_dtype, why_not_native
from workers.native.model import NativeDtype
from workers.native.packing import PANEL, Format
from workers.weights.checkpoint import Checkpoint
from workers.weights.packed_mode import PackingMode, packing_mode

ON_DEVICES = "bf16"
"""What devices are taken to multiply: narrower weights are widened on the way."""

_NAMED = {PackingMode.BF16: BF16, PackingMode.INT8: INT8, PackingMode.INT4: INT4}
_ROUNDED = {Format.Q8: "int8", Format.Q4: "int8 x int4"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    formats: tuple[WeightFormat, ...]
    """To plan for."""
    configured: WeightFormat
    """The one of them that the configuration and the model's file lead to."""
    cache: str
    """fp32, fp16 or bf16."""
    native: NativeDtype | None
    """None where the C library does not compute."""
    unmeasured: str = ""
    """Why whole steps cannot be measured, in words."""

    def products(self, weights: WeightFormat) -> str:
        """Return what is multiplied with such weights: fp32, int8, int8 x int4 or bf16."""
        if self.native is None:
            return self.cache
        return _ROUNDED.get(weights.layers, "fp32") if self.native is NativeDtype.INT8 else "fp32"


def on_device(config: EngineConfig, checkpoint: Checkpoint) -> Setup:
    """Return the setup of a model on an accelerator: bf16 unless the configuration says otherwise."""
    mode = PackingMode.BF16 if config.weights == "auto" else packing_mode(config.weights, config.dtype)
    configured = _stored(checkpoint, mode)
    return Setup(
        formats=_formats(checkpoint, configured),
        configured=configured,
        cache=ON_DEVICES,
        native=None,
        unmeasured="no step of a device is measured",
    )


def on_this_machine(config: EngineConfig, checkpoint: Checkpoint) -> Setup:
    """Return what `workers.loading` would choose. Raises ConfigError."""
    shape = checkpoint.shape
    reason = why_not_native(config)
    if reason is None and shape.ffn_size % PANEL:
        reason = f"the C library needs an ffn size that is a multiple of {PANEL}, is {shape.ffn_size}"
    if reason is not None:
        is_bf16 = config.dtype == "bf16" or (config.dtype == "auto" and kernels.native_dtype() is torch.bfloat16)
        weights = BF16 if is_bf16 else FP32
        return Setup(
            formats=(weights,),
            configured=weights,
            cache="bf16" if is_bf16 and kernels.activations(torch.bfloat16) is torch.bfloat16 else "fp32",
            native=None,
            unmeasured=f"torch computes: {reason}",
        )
    dtype = choose_dtype(config, shape)
    configured = _stored(checkpoint, packing_mode(config.weights, dtype.name.lower()))
    return Setup(
        formats=_formats(checkpoint, configured),
        configured=configured,
        cache="fp32" if dtype is NativeDtype.FP32 else "fp16",
        native=dtype,
    )


def _formats(checkpoint: Checkpoint, configured: WeightFormat) -> tuple[WeightFormat, ...]:
    usual = (BF16, INT8, INT4) if has_groups(checkpoint.shape) else (BF16,)
    return usual if configured in usual else (configured, *usual)


def _stored(checkpoint: Checkpoint, mode: PackingMode) -> WeightFormat:
    """Return what `packed_mode` makes of the first layer's up projection."""
    shape = checkpoint.shape
    name, size = "model.layers.0.mlp.up_proj.weight", (shape.ffn_size, shape.hidden_size)
    blocks = checkpoint.quantised(name, *size)
    if blocks is not None and (blocks.kind != "Q8_0" or mode is not PackingMode.INT4):
        return INT8 if blocks.kind == "Q8_0" else INT4
    if mode is PackingMode.BF16 or (mode in _NAMED and has_groups(shape)):
        return _NAMED[mode]
    low_bits = checkpoint.tensor(name, *size).view(torch.int32) & 0xFFFF
    return FP32 if low_bits.any() else BF16
