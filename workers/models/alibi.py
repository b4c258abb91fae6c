"""Attention of BLOOM and MPT, whose code in transformers computes it by itself: the same through our blocks.

ALiBi (Press et al., 2021) adds ``slope * position of the key`` to each score, a slope for each head. A key carries its
position as one more dimension, and a query its head's slope, so that their product has it:

    (q, slope / scale) . (k, position) * scale  =  q . k * scale  +  slope * position

No kernel has to know of it, and what is stored does not depend on who will attend to it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from workers.models.interface import Calls, LayerCall

MODEL_TYPES = ("bloom", "mpt")


class Positions:
    """Those of the rows of the step that is being computed, [rows]."""

    def __init__(self) -> None:
        self.rows = torch.empty(0)


def attach(module: torch.nn.Module, calls: Calls, positions: Positions) -> None:
    """Have every attention of `module`, a BLOOM or an MPT, attend by `calls`, for rows at `positions`."""
    for part in module.modules():
        if isinstance(part, BloomAttention):
            part.forward = _Bloom(part, calls, positions)
        elif isinstance(part, MptAttention):
            part.forward = _Mpt(part, calls, positions)


class _Alibi:
    def __init__(self, slopes: torch.Tensor, scale: float, calls: Calls, positions: Positions) -> None:
        self._bias = (slopes / scale).view(-1, 1, 1)
        self._scale = scale
        self._calls = calls
        self._positions = positions

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Map three of [heads, rows, dim] to [1, rows, heads * dim]."""
        heads, rows, dim = query.shape
        positions = self._positions.rows.to(key.dtype).view(1, rows, 1)
        query = torch.cat((query, self._bias.to(query.dtype).expand(heads, rows, 1)), -1)
        key = torch.cat((key, positions.expand(heads, rows, 1)), -1)
        self._calls.on_call(LayerCall(heads, heads, dim + 1, dim, is_causal=True, window=None, extras=()))
        return self._calls.attend(query, key, value, self._scale).flatten(1)[None]


class _Bloom:
    def __init__(self, part: Any, calls: Calls, positions: Positions) -> None:
        self._part = part
        slopes = build_alibi_tensor(torch.ones(1, 2), part.num_heads, torch.float32)[:, 0, 1]
        self._alibi = _Alibi(slopes, part.inv_norm_factor, calls, positions)

    def __call__(self, hidden_states: torch.Tensor, residual: torch.Tensor, *_: Any, **__: Any) -> Any:
        query, key, value = self._part._reshape(self._part.query_key_value(hidden_states))
        return self._part.dense(self._alibi.attend(query[0], key[0], value[0])) + residual, None


class _Mpt:
    def __init__(self, part: Any, calls: Calls, positions: Positions) -> None:
        self._part = part
        slopes = -build_mpt_alibi_tensor(part.n_heads, 2)[:, 0, 0]
        self._alibi = _Alibi(slopes, part.softmax_scale, calls, positions)

    def __call__(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        part = self._part
        mixed = part.Wqkv(hidden_states)
        if part.clip_qkv:
            mixed = mixed.clamp(min=-part.clip_qkv, max=part.clip_qkv)
        heads = (each.view(-1, part.n_heads, part.head_dim).transpose(0, 1) for each in mixed[0].chunk(3, -1))
        return part.out_proj(self._alibi.attend(*heads)), None
