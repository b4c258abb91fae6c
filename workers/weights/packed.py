"""A model as the C library is given it (`octavo.h`): matrices in panels, small vectors in fp32, and its shape.

Owns the list of what a model consists of: `parts` names every part with its size and the tensors of a checkpoint it is
made of. Knows no files and no way to pack; the arrays may be this process's own or mapped, and are only read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.native.packing import PANEL, PackedMatrix
from workers.weights.shape import ModelShape

Vector = npt.NDArray[np.float32]
PackedPart = PackedMatrix | Vector


class UnpackableError(Exception):
    """The panels of the C library have no place for a model of this shape; says which rule it breaks, and the value."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLayer:
    """`qkv` has the rows of q, then k, then v. `gate_up` has 16 rows of gate, the same 16 of up, the next 16 of gate;
    its ffn is a multiple of 16. Biases are in the order of the rows."""

    attention_norm: Vector
    ffn_norm: Vector
    query_norm: Vector | None
    key_norm: Vector | None
    qkv: PackedMatrix
    output: PackedMatrix
    gate_up: PackedMatrix
    down: PackedMatrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedModel:
    """`head` is `embedding`, the very same object, where the two are tied."""

    shape: ModelShape
    embedding: PackedMatrix
    head: PackedMatrix
    norm: Vector
    layers: tuple[PackedLayer, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of a model. `tensors`: the checkpoint's tensors whose rows it has, with the number of rows of each."""

    name: str
    tensors: Mapping[str, int]
    inputs: int | None = None
    """None: a vector."""
    has_bias: bool = False
    is_interleaved: bool = False
    """16 rows of each tensor in turn, not all rows of one after all of the other."""
    is_table: bool = False
    """Embedding or head: where rounding costs most and saves least."""

    @property
    def outputs(self) -> int:
        return sum(self.tensors.values())


def parts(shape: ModelShape) -> Iterator[Part]:
    """Yield what a model of this shape consists of, in the order of its use.

    Raises UnpackableError if gate and up are not made of whole panels, which could not be interleaved.
    """
    if shape.ffn_size % PANEL:
        raise UnpackableError(f"ffn_size must be a multiple of {PANEL} to be packed, is {shape.ffn_size}")
    vocab, hidden = shape.vocab_size, shape.hidden_size
    yield Part(name="embedding", tensors={"model.embed_tokens": vocab}, inputs=hidden, is_table=True)
    for number in range(shape.num_layers):
        yield from _layer_parts(shape, number)
    yield Part(name="norm", tensors={"model.norm": hidden})
    if not shape.tied_embeddings:
        yield Part(name="head", tensors={"lm_head": vocab}, inputs=hidden, is_table=True)


def _layer_parts(shape: ModelShape, number: int) -> Iterator[Part]:
    hidden, ffn = shape.hidden_size, shape.ffn_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    ours, theirs = f"layers.{number}", f"model.layers.{number}"
    attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
    yield Part(name=f"{ours}.attention_norm", tensors={f"{theirs}.input_layernorm": hidden})
    yield Part(
        name=f"{ours}.qkv",
        tensors={f"{attention}.q_proj": queries, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys},
        inputs=hidden,
        has_bias=shape.qkv_bias,
    )
    if shape.qk_norm:
        yield Part(name=f"{ours}.query_norm", tensors={f"{attention}.q_norm": shape.head_dim})
        yield Part(name=f"{ours}.key_norm", tensors={f"{attention}.k_norm": shape.head_dim})
    yield Part(
        name=f"{ours}.output", tensors={f"{attention}.o_proj": hidden}, inputs=queries, has_bias=shape.output_bias
    )
    yield Part(name=f"{ours}.ffn_norm", tensors={f"{theirs}.post_attention_layernorm": hidden})
    yield Part(
        name=f"{ours}.gate_up",
        tensors={f"{mlp}.gate_proj": ffn, f"{mlp}.up_proj": ffn},
        inputs=hidden,
        has_bias=shape.ffn_bias,
        is_interleaved=True,
    )
    yield Part(name=f"{ours}.down", tensors={f"{mlp}.down_proj": hidden}, inputs=ffn, has_bias=shape.ffn_bias)


def assemble(shape: ModelShape, packed: Mapping[str, PackedPart]) -> PackedModel:
    """Return the model of all its `parts`, by name."""

    def matrix(name: str) -> PackedMatrix:
        part = packed[name]
        assert isinstance(part, PackedMatrix)
        return part

    def vector(name: str) -> Vector:
        part = packed[name]
        assert not isinstance(part, PackedMatrix)
        return part

    def layer(ours: str) -> PackedLayer:
        return PackedLayer(
            attention_norm=vector(f"{ours}.attention_norm"),
            ffn_norm=vector(f"{ours}.ffn_norm"),
            query_norm=vector(f"{ours}.query_norm") if shape.qk_norm else None,
            key_norm=vector(f"{ours}.key_norm") if shape.qk_norm else None,
            qkv=matrix(f"{ours}.qkv"),
            output=matrix(f"{ours}.output"),
            gate_up=matrix(f"{ours}.gate_up"),
            down=matrix(f"{ours}.down"),
        )

    embedding = matrix("embedding")
    return PackedModel(
        shape=shape,
        embedding=embedding,
        head=embedding if shape.tied_embeddings else matrix("head"),
        norm=vector("norm"),
        layers=tuple(layer(f"layers.{number}") for number in range(shape.num_layers)),
    )
