"""What a packed model must be: the checkpoint's tensors, and equal to another packed model."""

from __future__ import annotations

from typing import Any

import numpy as np

from workers.native.packing import PANEL, PackedMatrix, unpack
from workers.weights.checkpoint import Checkpoint
from workers.weights.packed import PackedModel

Array = np.ndarray[Any, Any]


def assert_holds(model: PackedModel, checkpoint: Checkpoint) -> None:
    """Assert that every number of `model` is the checkpoint's own, bit for bit."""
    shape = checkpoint.shape
    hidden, ffn, vocab = shape.hidden_size, shape.ffn_size, shape.vocab_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def tensor(name: str, *size: int) -> Array:
        return checkpoint.tensor(name, *size).numpy()

    assert model.shape == shape
    assert_same(unpack(model.embedding), tensor("model.embed_tokens.weight", vocab, hidden))
    assert_same(model.norm, tensor("model.norm.weight", hidden))
    assert (model.head is model.embedding) == shape.tied_embeddings
    if not shape.tied_embeddings:
        assert_same(unpack(model.head), tensor("lm_head.weight", vocab, hidden))
    assert len(model.layers) == shape.num_layers
    for number, layer in enumerate(model.layers):
        at = f"model.layers.{number}"
        projections = (("q_proj", queries), ("k_proj", keys), ("v_proj", keys))
        qkv = [tensor(f"{at}.self_attn.{name}.weight", size, hidden) for name, size in projections]
        assert_same(unpack(layer.qkv), np.concatenate(qkv))
        assert (layer.qkv.bias is not None) == shape.qkv_bias
        if layer.qkv.bias is not None:
            biases = [tensor(f"{at}.self_attn.{name}.bias", size) for name, size in projections]
            assert_same(layer.qkv.bias, np.concatenate(biases))
        assert_same(unpack(layer.output), tensor(f"{at}.self_attn.o_proj.weight", hidden, queries))
        _assert_bias(layer.output, tensor(f"{at}.self_attn.o_proj.bias", hidden) if shape.output_bias else None)
        both = unpack(layer.gate_up).reshape(-1, 2, PANEL, hidden)
        for place, name in enumerate(("gate_proj", "up_proj")):
            assert_same(both[:, place].reshape(ffn, hidden), tensor(f"{at}.mlp.{name}.weight", ffn, hidden))
            if layer.gate_up.bias is not None:
                bias = layer.gate_up.bias.reshape(-1, 2, PANEL)[:, place].reshape(ffn)
                assert_same(bias, tensor(f"{at}.mlp.{name}.bias", ffn))
        assert (layer.gate_up.bias is not None) == shape.ffn_bias
        assert_same(unpack(layer.down), tensor(f"{at}.mlp.down_proj.weight", hidden, ffn))
        _assert_bias(layer.down, tensor(f"{at}.mlp.down_proj.bias", hidden) if shape.ffn_bias else None)
        assert_same(layer.attention_norm, tensor(f"{at}.input_layernorm.weight", hidden))
        assert_same(layer.ffn_norm, tensor(f"{at}.post_attention_layernorm.weight", hidden))
        for norm, name in ((layer.query_norm, "q_norm"), (layer.key_norm, "k_norm")):
            assert (norm is not None) == shape.qk_norm
            if norm is not None:
                assert_same(norm, tensor(f"{at}.self_attn.{name}.weight", shape.head_dim))


def assert_equal(one: PackedModel, other: PackedModel) -> None:
    """Assert that both have the same shape, formats and bytes."""
    assert one.shape == other.shape
    assert (one.head is one.embedding) == (other.head is other.embedding)
    for ours, theirs in zip(_arrays(one), _arrays(other), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert_same(ours, theirs)
    assert [matrix.format for matrix in matrices(one)] == [matrix.format for matrix in matrices(other)]


def matrices(model: PackedModel) -> list[PackedMatrix]:
    """Return embedding and head, then those of each layer."""
    in_layers = [m for layer in model.layers for m in (layer.qkv, layer.output, layer.gate_up, layer.down)]
    return [model.embedding, model.head, *in_layers]


def assert_same(ours: Array, theirs: Array) -> None:
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    assert np.array_equal(ours, theirs)


def _arrays(model: PackedModel) -> list[Array | None]:
    norms = [(each.attention_norm, each.ffn_norm, each.query_norm, each.key_norm) for each in model.layers]
    return [
        model.norm,
        *(norm for layer in norms for norm in layer),
        *(array for matrix in matrices(model) for array in (matrix.data, matrix.bias)),
    ]


def _assert_bias(matrix: PackedMatrix, expected: Array | None) -> None:
    assert (matrix.bias is None) == (expected is None)
    if matrix.bias is not None and expected is not None:
        assert_same(matrix.bias, expected)
