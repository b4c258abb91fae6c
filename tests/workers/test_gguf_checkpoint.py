"""GGUF files as checkpoints: every quantisation, the rotary order, and what is refused."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from tests.workers.gguf_files import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB, random_tensors, write_gguf
from workers.errors import ModelFileError
from workers.models.llama import LlamaModel
from workers.weights.checkpoint import open_checkpoint
from workers.weights.gguf_checkpoint import GgufCheckpoint, gguf_name, halves_from_pairs
from workers.weights.gguf_header import read_header

Kind = gguf.GGMLQuantizationType


def known_kinds() -> list[Kind]:
    """The types that the package can undo."""
    kinds = []
    for kind in Kind:
        try:
            gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
        except (NotImplementedError, ValueError):
            continue
        kinds.append(kind)
    return kinds


def test_shape(tmp_path: Path) -> None:
    shape = GgufCheckpoint(write_gguf(tmp_path / "a.gguf", random_tensors())).shape
    assert (shape.vocab_size, shape.hidden_size, shape.num_layers) == (VOCAB, HIDDEN, 1)
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert shape.tied_embeddings
    assert not shape.qk_norm


@pytest.mark.parametrize("kind", known_kinds(), ids=lambda kind: kind.name)
def test_every_type_is_read(tmp_path: Path, kind: Kind) -> None:
    """Random bytes below 60 are numbers in every type: no exponent of theirs is that of an infinity."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(5).integers(0, 60, size=(4, 256 // block * block_bytes)).astype(np.uint8)
    name = "blk.0.ffn_up.weight"
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", random_tensors(), raw={name: (raw, kind)}))
    tensor = checkpoint.tensor("model.layers.0.mlp.up_proj.weight", 4, 256)
    assert tensor.dtype is torch.float32
    assert np.array_equal(tensor.numpy(), gguf.quants.dequantize(raw, kind))


def test_enough_types_are_known() -> None:
    names = {kind.name for kind in known_kinds()}
    assert names >= {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS"}


def test_rotary_rows_come_back_in_halves(tmp_path: Path) -> None:
    """Row 2i of a head in GGUF is row i of the first half, row 2i + 1 row i of the second."""
    tensors = random_tensors()
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))
    for part, stored, heads in (("q_proj", "attn_q", HEADS), ("k_proj", "attn_k", KV_HEADS)):
        tensor = checkpoint.tensor(f"model.layers.0.self_attn.{part}.weight", heads * HEAD_DIM, HIDDEN)
        by_head = tensors[f"blk.0.{stored}.weight"].reshape(heads, HEAD_DIM, HIDDEN)
        expected = np.concatenate([by_head[:, 0::2], by_head[:, 1::2]], axis=1).reshape(-1, HIDDEN)
        assert np.array_equal(tensor.numpy(), expected)
    assert halves_from_pairs(np.arange(8, dtype=np.float32), num_heads=2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_qwen_rows_stay_as_they_are(tmp_path: Path) -> None:
    tensors = random_tensors()
    keys = {
        name.replace("llama", "qwen2").replace(".", "__"): value
        for name, value in {
            "llama.block_count": 1,
            "llama.context_length": 64,
            "llama.embedding_length": HIDDEN,
            "llama.feed_forward_length": 64,
            "llama.attention.head_count": HEADS,
            "llama.attention.head_count_kv": KV_HEADS,
            "llama.attention.layer_norm_rms_epsilon": 1e-6,
        }.items()
    }
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors, architecture="qwen2", **keys))
    assert checkpoint.shape.qkv_bias
    tensor = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight", HEADS * HEAD_DIM, HIDDEN)
    assert np.array_equal(tensor.numpy(), tensors["blk.0.attn_q.weight"])


def test_names() -> None:
    assert gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_name("lm_head.weight") == "output.weight"
    assert gguf_name("model.layers.17.self_attn.q_proj.bias") == "blk.17.attn_q.bias"


def test_rope_frequencies(tmp_path: Path) -> None:
    divisors = np.linspace(1, 8, HEAD_DIM // 2).astype(np.float32)
    path = write_gguf(tmp_path / "a.gguf", random_tensors() | {"rope_freqs.weight": divisors})
    rope = GgufCheckpoint(path).shape.rope
    assert rope.scaling == "divisors"
    assert rope.divisors == tuple(divisors.tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma2"}, "architecture 'gemma2' is not supported in GGUF; supported: llama, qwen2, qwen3"),
        ({"llama__block_count": None}, "metadata has no llama.block_count"),
        ({"llama__expert_count": 8}, "mixture of experts (8 experts) is not supported"),
        ({"llama__rope__dimension_count": 8}, "partial rotary embedding (8 of 16 dimensions)"),
        ({"llama__rope__scaling__type": "yarn"}, "rope scaling 'yarn' is not supported in GGUF"),
        ({"llama__attention__head_count_kv": 3}, "4 heads cannot share 3 key/value heads"),
        ({"llama__attention__head_count": 0}, "head_count must be >= 1, is 0"),
        ({"llama__attention__value_length": 8}, "values of 8 dimensions beside keys of 16"),
        ({"llama__rope__scaling__type": "linear"}, "metadata: KeyError: 'llama.rope.scaling.factor'"),
        ({"llama__context_length": 0}, "max_positions must be >= 1, is 0"),
        ({"llama__block_count": "many"}, "llama.block_count must be one number"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        open_checkpoint(write_gguf(tmp_path / "a.gguf", random_tensors(), **changes))  # type: ignore[arg-type]
    assert message in str(caught.value)
    assert "a.gguf" in str(caught.value)


def test_truncated_data(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", random_tensors())
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(size - 300)
    with pytest.raises(ModelFileError, match=rf"truncated: tensor '.*' ends at byte \d+, the file has {size - 300}"):
        open_checkpoint(path)


def test_overlapping_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", random_tensors())
    content = path.read_bytes()
    last = gguf.GGUFReader(path).tensors[-1].field
    at = last.offset + sum(part.nbytes for part in last.parts) - 8
    path.write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    with pytest.raises(ModelFileError, match="overlaps"):
        open_checkpoint(path)


def test_unknown_type(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", random_tensors())
    last = gguf.GGUFReader(path).tensors[-1].field
    at = last.offset + sum(part.nbytes for part in last.parts) - 12
    content = path.read_bytes()
    path.write_bytes(content[:at] + b"\xee\0\0\0" + content[at + 4 :])
    with pytest.raises(ModelFileError, match="has the unknown type 238"):
        open_checkpoint(path)


def test_type_that_cannot_be_dequantised(tmp_path: Path) -> None:
    tensors = random_tensors() | {"blk.0.ffn_up.weight": np.zeros((64, HIDDEN), dtype=np.int8)}
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))
    with pytest.raises(ModelFileError, match=r"'blk.0.ffn_up.weight' is of type I8"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight", 64, HIDDEN)


def test_missing_misshapen_and_infinite_tensors(tmp_path: Path) -> None:
    tensors = random_tensors()
    del tensors["blk.0.ffn_up.weight"]
    tensors["output_norm.weight"][3] = np.inf
    checkpoint = open_checkpoint(write_gguf(tmp_path / "a.gguf", tensors))
    with pytest.raises(ModelFileError, match=r"a.gguf: tensor blk.0.ffn_up.weight is missing"):
        checkpoint.tensor("model.layers.0.mlp.up_proj.weight", 64, HIDDEN)
    with pytest.raises(ModelFileError, match=r"blk.0.ffn_down.weight: size must be \[64, 65\], is \[64, 64\]"):
        checkpoint.tensor("model.layers.0.mlp.down_proj.weight", 64, 65)
    with pytest.raises(ModelFileError, match=r"output_norm.weight: has numbers that are not finite"):
        checkpoint.tensor("model.norm.weight", HIDDEN)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such model file or directory"):
        open_checkpoint(tmp_path / "absent.gguf")


def test_flipped_bytes_in_the_header_never_raise_anything_else(tmp_path: Path) -> None:
    """A broken file is refused or loads as some model; it never ends in another error, nor takes memory for sizes that
    it only claims."""
    content = write_gguf(tmp_path / "whole.gguf", random_tensors()).read_bytes()
    end = read_header(tmp_path / "whole.gguf").data_start
    generator, path = random.Random(4), tmp_path / "flipped.gguf"
    num_loaded = 0
    for _ in range(400):
        broken = bytearray(content)
        broken[generator.randrange(24, end)] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        with contextlib.suppress(ModelFileError):
            LlamaModel(open_checkpoint(path), torch.float32)
            num_loaded += 1
    assert 0 < num_loaded < 400
