"""A GGUF file as a `Checkpoint`: every quantisation that the package `gguf` can undo, given back as fp32.

llama.cpp stores the rotary dimensions of architecture "llama" interleaved (pairs 0-1, 2-3, ...), Hugging Face in halves
(pairs 0-32, 1-33, ...); all that is returned has the halves. `gguf` is imported when the first file is opened, and
torch for the first tensor: packing needs none.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from workers.errors import ModelFileError
from workers.weights.checkpoint import BLOCK_BYTES, QuantisedRows
from workers.weights.gguf_header import GgufTensor, read_header
from workers.weights.shape import ModelShape, from_gguf

if TYPE_CHECKING:
    import torch

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

Rows = TypeVar("Rows", npt.NDArray[np.float32], npt.NDArray[np.uint8])


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
        import torch

        return torch.from_numpy(self.array(name, *size))

    def stored(self, name: str, *size: int) -> torch.Tensor:
        return self.tensor(name, *size)

    def array(self, name: str, *size: int) -> npt.NDArray[np.float32]:
        entry = self._entry(name, size)
        values = self._dequantise(entry)
        # A sum is not finite if any term is not: one pass without a mask of the tensor's size.
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(values.sum()):
                raise ModelFileError(f"{self._where(entry.name)}: has numbers that are not finite")
        return self._in_halves(name, values)

    def quantised(self, name: str, *size: int) -> QuantisedRows | None:
        entry = self._entry(name, size)
        kind = _ggml_type(entry).name
        if kind not in BLOCK_BYTES:
            return None
        rows = self._raw(entry)
        halves = rows.reshape(size[0], -1, BLOCK_BYTES[kind]).view(np.float16)
        if not np.isfinite(halves[..., : 2 if kind == "Q4_1" else 1]).all():  # scales, and the minima of Q4_1
            raise ModelFileError(f"{self._where(entry.name)}: has numbers that are not finite")
        return QuantisedRows(kind, self._in_halves(name, rows))

    def _entry(self, name: str, size: tuple[int, ...]) -> GgufTensor:
        stored = gguf_name(name)
        entry = self._header.tensors.get(stored)
        if entry is None:
            raise ModelFileError(f"{self._where(stored)} is missing")
        if entry.size != size:
            raise ModelFileError(f"{self._where(stored)}: size must be {list(size)}, is {list(entry.size)}")
        return entry

    def _where(self, stored: str) -> str:
        return f"{self._path.name}: tensor {stored}"

    def _in_halves(self, name: str, rows: Rows) -> Rows:
        """Return the rows of the tensor `name` in Hugging Face's order."""
        if self.shape.architecture == "llama" and ".q_proj." in name:
            return halves_from_pairs(rows, self.shape.num_heads)
        if self.shape.architecture == "llama" and ".k_proj." in name:
            return halves_from_pairs(rows, self.shape.num_kv_heads)
        return rows

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

    def _dequantise(self, entry: GgufTensor) -> npt.NDArray[np.float32]:
        from gguf import quants

        try:
            # Scales may be anything; what is not finite then is for `array` to refuse.
            with np.errstate(all="ignore"):
                values = quants.dequantize(self._raw(entry), _ggml_type(entry))
        except NotImplementedError as error:
            raise ModelFileError(f"tensor {entry.name!r} is of type {_ggml_type(entry).name}: {error}") from error
        return np.array(values, dtype=np.float32, copy=not values.flags.writeable)

    def _raw(self, entry: GgufTensor) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor as [.., bytes of a row], mapped."""
        start = self._header.data_start + entry.offset
        return self._data[start : start + _num_bytes(entry)].reshape(*entry.size[:-1], -1)


def gguf_name(name: str) -> str:
    """Return llama.cpp's name for Hugging Face's ("model.layers.3.mlp.up_proj.weight" -> "blk.3.ffn_up.weight")."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{kind}"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_IN_LAYER[part]}.{kind}"


def halves_from_pairs(tensor: Rows, num_heads: int) -> Rows:
    """Reorder the rows of each head of a q/k weight [heads * dim, in or bytes] or bias [heads * dim].

    pairs   x0 y0 x1 y1 x2 y2 ...      halves  x0 x1 x2 ... y0 y1 y2 ...
    """
    rows = tensor.reshape(num_heads, -1, 2, *tensor.shape[1:])
    return rows.swapaxes(1, 2).reshape(tensor.shape)


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
