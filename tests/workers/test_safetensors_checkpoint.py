"""Directories of safetensors as checkpoints: config.json in its dialects, shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workers.errors import ModelFileError
from workers.weights.checkpoint import open_checkpoint
from workers.weights.shape import ModelShape, Rope, from_config

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def shape_of(**changes: Any) -> ModelShape:
    return from_config({key: value for key, value in (CONFIG | changes).items() if value is not None})


def write_model(directory: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(CONFIG | changes))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_defaults() -> None:
    shape = shape_of(num_key_value_heads=None)
    assert (shape.num_kv_heads, shape.head_dim) == (4, 8)
    assert shape.rope == Rope(theta=10000.0)
    assert not shape.tied_embeddings
    assert shape.sliding_window is None


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, Rope(scaling="linear", factor=2.0)),
        ({"rope_scaling": LLAMA3, "rope_theta": 5e5}, Rope(theta=5e5, scaling="llama3", factor=8.0)),
        ({"rope_parameters": LLAMA3 | {"rope_theta": 5e5}}, Rope(theta=5e5, scaling="llama3", factor=8.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, Rope(theta=1e6)),
    ],
)
def test_old_and_new_rope_keys(changes: dict[str, Any], rope: Rope) -> None:
    assert shape_of(**changes).rope == rope


def test_biases_by_architecture() -> None:
    llama = shape_of(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.ffn_bias) == (True, True, True)
    qwen2 = shape_of(architectures=["Qwen2ForCausalLM"])
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    assert shape_of(architectures=["Qwen3ForCausalLM"]).qk_norm


def test_sliding_windows() -> None:
    """Mistral's always applies; Qwen's only where it is switched on; Llama has none."""
    assert shape_of(architectures=["MistralForCausalLM"], sliding_window=4096).sliding_window == 4096
    assert shape_of(architectures=["Qwen2ForCausalLM"], sliding_window=4096).sliding_window is None
    qwen2 = shape_of(architectures=["Qwen2ForCausalLM"], sliding_window=4096, use_sliding_window=True)
    assert qwen2.sliding_window == 4096
    assert shape_of(sliding_window=4096).sliding_window is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["BloomForCausalLM"]}, "architecture 'BloomForCausalLM' is not supported; supported: Llama"),
        ({"architectures": None, "model_type": "mpt"}, "architecture 'mpt' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised safetensors (quant_method 'gptq')"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', is 'gelu'"),
        ({"hidden_size": None}, "config.json: KeyError: 'hidden_size'"),
        ({"vocab_size": "many"}, "config.json: ValueError"),
        ({"num_hidden_layers": 0}, "num_layers must be >= 1, is 0"),
        ({"num_attention_heads": 0}, "config.json: ZeroDivisionError"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
        ({"head_dim": 7}, "head_dim must be even for rotary embedding, is 7"),
        ({"rms_norm_eps": 0}, "norm_eps must be positive and at most 1, is 0"),
        ({"rms_norm_eps": 1e39}, "norm_eps must be positive and at most 1, is 1e+39"),
        ({"rope_theta": -1.0}, "rope theta must be positive, is -1.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling 'yarn' is not supported"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "rope factor must be positive, is 0"),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}},
            "rope high_freq_factor must be greater than low_freq_factor",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**32}},
            "rope original_max_position_embeddings must be in (0, 2^32), is 4294967296",
        ),
        ({"rope_scaling": "linear"}, "config.json: ValueError"),
        ({"quantization_config": "gptq"}, "config.json: AttributeError"),
        ({"partial_rotary_factor": 0.5}, "partial rotary embedding is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        shape_of(**changes)
    assert message in str(caught.value)


def test_every_float_type_becomes_fp32(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0, 0.25])
    names = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16}
    checkpoint = open_checkpoint(write_model(tmp_path, {name: values.to(dtype) for name, dtype in names.items()}))
    for name in names:
        tensor = checkpoint.tensor(name, 3)
        assert tensor.dtype is torch.float32
        assert torch.equal(tensor, values)


def test_broken_tensors(tmp_path: Path) -> None:
    tensors = {"nan": torch.tensor([1.0, float("nan")]), "int": torch.tensor([1])}
    checkpoint = open_checkpoint(write_model(tmp_path, tensors))
    for name, size, message in (
        ("nan", 2, "model.safetensors: tensor nan: has numbers that are not finite"),
        ("nan", 3, r"size must be \[3\], is \[2\]"),
        ("int", 1, "torch.int64, which needs a quantised kernel"),
        ("absent", 1, "tensor absent is missing"),
    ):
        with pytest.raises(ModelFileError, match=message):
            checkpoint.tensor(name, size)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"config\.json: cannot be read"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"config\.json: is not JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelFileError, match="must be a JSON object"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelFileError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)
    write_model(tmp_path, {"a": torch.zeros(1000)})
    whole = (tmp_path / "model.safetensors").read_bytes()
    for size in (0, 4, 50, 2000):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        with pytest.raises(ModelFileError, match=r"model\.safetensors: corrupt or truncated"):
            open_checkpoint(tmp_path)


def test_broken_indices(tmp_path: Path) -> None:
    write_model(tmp_path, {"a": torch.zeros(2)})
    index = tmp_path / "model.safetensors.index.json"
    for content, message in (
        ({}, "weight_map must name the file of each tensor, is None"),
        ({"weight_map": {"a": "../a.safetensors"}}, "must lie in the same directory"),
        ({"weight_map": {"a": "other.safetensors"}}, r"other\.safetensors: is missing"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(ModelFileError, match=message):
            open_checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert open_checkpoint(tmp_path).tensor("a", 2).tolist() == [0.0, 0.0]
