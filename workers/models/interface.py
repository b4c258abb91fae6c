"""How code of transformers attends by ours: a function in its attention interface, and the step that it belongs to.

A model that is loaded with `IMPLEMENTATION` calls `_attend` in each of its layers, one after the other. Which layer
that is, where keys and values go and what is attended to is known to its `Calls`, which every module of it carries.

    query [1, heads, rows, dim], key and value [1, kv_heads, rows, dim]  ->  [1, rows, heads, dim of a value]

The rows are those of a step, of many sequences. Transformers makes no mask for an implementation whose masks it does
not know; ours needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers import AttentionInterface

from workers.attention.backend import StepAttention

IMPLEMENTATION = "octavo"


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer asks of attention, its numbers of heads and their sizes among it."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    is_causal: bool
    window: int | None
    """Tokens that a position sees; None: all."""
    extras: tuple[str, ...]
    """Whatever else it asks for, by name."""


class Step(Protocol):
    """Attends for all layers of one step."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Map [heads, rows, dim] and twice [kv_heads, rows, dim] to [rows, heads, dim of a value]."""


class Calls:
    """Counts the layers of a step. Shared by all modules of one model; one step at a time."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._layer = 0
        self.on_call: Callable[[LayerCall], object] = lambda call: None

    def bind(self, module: torch.nn.Module) -> None:
        """Have all parts of `module` attend by this."""
        for part in module.modules():
            part.octavo_calls = self  # type: ignore[assignment]

    @contextmanager
    def during(self, step: Step, num_layers: int | None = None) -> Iterator[None]:
        """Let `step` attend within this context; it has to have been asked once by each of `num_layers`."""
        self._step, self._layer = step, 0
        try:
            yield
            assert num_layers is None or self._layer == num_layers, "a layer did not attend through the interface"
        finally:
            self._step = None

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """Attend in the next layer; without a batch dimension, see `Step.attend`."""
        assert self._step is not None
        layer, self._layer = self._layer, self._layer + 1
        return self._step.attend(layer, query, key, value, scale)


class BlockStep:
    """A step whose keys and values are in blocks of heads of one size, `head_dim`: shorter ones are filled up with
    zeros, which add nothing to a product. `attention` scales by head_dim ** -0.5, so queries bring the rest along."""

    def __init__(self, attention: StepAttention, head_dim: int, dtype: torch.dtype) -> None:
        self._attention = attention
        self._head_dim = head_dim
        self._dtype = dtype

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        own = scale * math.sqrt(self._head_dim)
        if abs(own - 1) > 1e-9:
            query = query * own
        queries, keys, values = (self._rows(heads) for heads in (query, key, value))
        mixed = self._attention.attend(layer, queries, keys, values)
        return mixed.view(queries.shape)[..., : value.shape[-1]].to(value.dtype)

    def _rows(self, heads: torch.Tensor) -> torch.Tensor:
        missing = self._head_dim - heads.shape[-1]
        return (pad(heads, (0, missing)) if missing else heads).transpose(0, 1).to(self._dtype)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **asked: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls. Raises what the step raises."""
    calls: Calls = module.octavo_calls
    window = asked.get("sliding_window")
    extras = [name for name in ("softcap", "s_aux", "position_bias", "head_mask") if asked.get(name) is not None]
    if attention_mask is not None:
        extras.append("attention_mask")
    if query.shape[-2] != key.shape[-2]:
        extras.append("keys of others")
    calls.on_call(
        LayerCall(
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            key_dim=key.shape[-1],
            value_dim=value.shape[-1],
            is_causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
            window=int(window) if window else None,
            extras=tuple(extras),
        )
    )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return calls.attend(query[0], key[0], value[0], scale)[None], None


AttentionInterface.register(IMPLEMENTATION, _attend)
