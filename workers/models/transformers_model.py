"""A decoder of transformers over our blocks: its module computes, and attends through `interface`.

Owns the module. What it asks of attention is found out by asking it (`probe.py`), and a model whose code asks for what
blocks do not have is refused: so is one that does not come to the same as it does by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.attention.backend import AttentionBackend, StepAttention
from workers.attention.cache import KvCache
from workers.attention.cpu import CpuAttention
from workers.attention.layout import StepLayout
from workers.errors import ModelFileError
from workers.kv_memory import KvMemory
from workers.models import alibi
from workers.models.interface import BlockStep, Calls, LayerCall
from workers.models.llama import DTYPE_NAMES
from workers.models.torch_forward import TorchForward


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """What an engine has to know of a decoder: see `workers.forward.ServedShape`."""

    vocab_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    sliding_window: int | None = None


class TransformersModel:
    """`module` is a decoder with a head, set to `interface.IMPLEMENTATION` (BLOOM and MPT: to "eager") and in eval
    mode. `layers` is what each of its layers asks of attention."""

    kernels = "transformers"

    def __init__(
        self, module: Any, calls: Calls, positions: alibi.Positions, layers: Sequence[LayerCall], max_positions: int
    ) -> None:
        """Raises ModelFileError if its layers ask for what our blocks do not have."""
        self._module = module
        self._calls = calls
        self._positions = positions
        parameters = inspect.signature(module.forward).parameters
        self._takes_positions = "position_ids" in parameters
        self._takes_rows = "logits_to_keep" in parameters
        self.shape = shape_of(layers, module.config.get_text_config().vocab_size, max_positions)
        self.dtype: torch.dtype = module.dtype
        self.cache_dtype = f"u{self.dtype.itemsize}"
        self.dtype_name = DTYPE_NAMES[self.dtype]
        self.adapters: set[str] = set()

    def new_cache(self, *, num_blocks: int, block_size: int) -> KvCache:
        """Return a cache for this model."""
        return KvCache(
            num_layers=self.shape.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=self.shape.num_kv_heads,
            block_size=block_size,
            head_dim=self.shape.head_dim,
            dtype=self.dtype,
        )

    def over(self, cache: KvMemory, attention: AttentionBackend | None = None) -> TorchForward:
        """Return the model at work over `cache`, attending by `attention` or the CPU's own."""
        assert isinstance(cache, KvCache)
        return TorchForward(self, cache, attention or CpuAttention())

    @torch.inference_mode()
    def forward(self, layout: StepLayout, attention: StepAttention) -> torch.Tensor:
        """Compute the rows of a step; return the logits [len(layout.sampling_rows), vocab_size] in fp32."""
        self._positions.rows = layout.positions
        given: dict[str, Any] = {"use_cache": False}
        if self._takes_positions:
            given["position_ids"] = layout.positions[None]
        if self._takes_rows:
            # Not none: some models take the last row of whatever is kept.
            given["logits_to_keep"] = layout.sampling_rows
        step = BlockStep(attention, self.shape.head_dim, self.dtype)
        with self._calls.during(step, self.shape.num_layers):
            logits: torch.Tensor = self._module(input_ids=layout.tokens[None], **given).logits[0]
        return (logits if self._takes_rows else logits[layout.sampling_rows]).float().contiguous()


def shape_of(layers: Sequence[LayerCall], vocab_size: int, max_positions: int) -> DecoderShape:
    """Return the shape of a decoder whose `layers` these are. Raises ModelFileError for what is not served."""
    if not layers:
        raise ModelFileError(
            "its code in transformers does not attend through transformers' attention interface, so it cannot be "
            "computed over blocks"
        )
    if extras := sorted({name for layer in layers for name in layer.extras}):
        raise ModelFileError(f"its attention asks for {', '.join(extras)}, which the engine's attention does not have")
    if not all(layer.is_causal for layer in layers):
        raise ModelFileError("its attention is not causal: it is no decoder")
    if len({layer.num_kv_heads for layer in layers}) > 1:
        raise ModelFileError("its layers have different numbers of key and value heads")
    return DecoderShape(
        vocab_size=vocab_size,
        num_layers=len(layers),
        num_kv_heads=layers[0].num_kv_heads,
        head_dim=max(max(layer.key_dim, layer.value_dim) for layer in layers),
        max_positions=max_positions,
        sliding_window=min((layer.window for layer in layers if layer.window is not None), default=None),
    )
