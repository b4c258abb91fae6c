"""A GGUF file as a `Checkpoint`: every quantisation that the package `gguf` can undo, given back as fp32.

llama.cpp stores the rotary dimensions of architecture "llama" interleaved (pairs 0-1, 2-3, ...), Hugging Face in halves
(pairs 0-32, 1-33, ...); `tensor` returns the halves. `gguf` is imported when the first file is opened, not before.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from workers.errors import ModelFileError
from workers.weights.checkpoint import checked
from workers.weights.gguf_header import GgufTensor, read_header
from workers.weights.shape import ModelShape, from_gguf

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GgufCheckpoint:
    """Raises ModelFileError if the header is corrupt, a tensor lies outside the file or on another one, or the type or
    the architecture is not supported."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._header = read_header(path)
        self._data = np.memmap(path, dtype=np.uint8, mode="r")
        try:
            self._check_layout()
            self.shape: ModelShape = self._read_shape()
        except ModelFileError as error:
            raise ModelFileError(f"{path.name}: {error}") from error

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        stored = gguf_name(name)
        entry = self._header.tensors.get(stored)
        where = f"{self._path.name}: tensor {stored}"
        if entry is None:
            raise ModelFileError(f"{where} is missing")
        if entry.size != size:
            raise ModelFileError(f"{where}: size must be {list(size)}, is {list(entry.size)}")
        tensor = checked(self._dequantise(entry), where, size)
        if self.shape.architecture == "llama" and ".q_proj." in name:
            return halves_from_pairs(tensor, self.shape.num_heads)
        if self.shape.architecture == "llama" and ".k_proj." in name:
            return halves_from_pairs(tensor, self.shape.num_kv_heads)
        return tensor

    def _read_shape(self) -> ModelShape:
        header = self._header
        embedding = header.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.size) != 2:
            raise ModelFileError("tensor token_embd.weight is missing or not a matrix")
        frequencies = header.tensors.get("rope_freqs.weight")
        divisors = () if frequencies is None else tuple(self._dequantise(frequencies).flatten().tolist())
        return from_gguf(
            header.metadata,
            vocab_size=embedding.size[0],
            tied="output.weight" not in header.tensors,
            divisors=divisors,
        )

    def _check_layout(self) -> None:
        """Every tensor's bytes are inside the file and nobody else's."""
        end, previous = 0, ""
        for entry in sorted(self._header.tensors.values(), key=lambda entry: entry.offset):
            if entry.offset < end:
                raise ModelFileError(f"tensor {entry.name!r} overlaps {previous!r}")
            end, previous = entry.offset + _num_bytes(entry), entry.name
            if self._header.data_start + end > len(self._data):
                raise ModelFileError(
                    f"truncated: tensor {entry.name!r} ends at byte {self._header.data_start + end}, "
                    f"the file has {len(self._data)}"
                )

    def _dequantise(self, entry: GgufTensor) -> torch.Tensor:
        from gguf import quants

        start = self._header.data_start + entry.offset
        raw = self._data[start : start + _num_bytes(entry)].reshape(*entry.size[:-1], -1)
        try:
            values = quants.dequantize(raw, _ggml_type(entry))
        except NotImplementedError as error:
            raise ModelFileError(f"tensor {entry.name!r} is of type {_ggml_type(entry).name}: {error}") from error
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=not values.flags.writeable))


def gguf_name(name: str) -> str:
    """Return llama.cpp's name for Hugging Face's ("model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight")."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_IN_LAYER[part]}.{kind}"


def halves_from_pairs(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder the rows of each head of a q/k weight [heads * dim, in] or bias [heads * dim].

    pairs   x0 y0 x1 y1 x2 y2 ...      halves  x0 x1 x2 ... y0 y1 y2 ...
    """
    rows = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return rows.transpose(1, 2).reshape(tensor.shape)


def _ggml_type(entry: GgufTensor) -> Any:
    from gguf import GGMLQuantizationType

    try:
        return GGMLQuantizationType(entry.type_id)
    except ValueError:
        raise ModelFileError(f"tensor {entry.name!r} has the unknown type {entry.type_id}") from None


def _num_bytes(entry: GgufTensor) -> int:
    from gguf import GGML_QUANT_SIZES

    block, block_bytes = GGML_QUANT_SIZES[_ggml_type(entry)]
    if entry.size[-1] % block:
        raise ModelFileError(f"rows of tensor {entry.name!r} have {entry.size[-1]} numbers, no multiple of {block}")
    return int(math.prod(entry.size) // block * block_bytes)
