"""Weights on their way to a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from tests.workers.random_models import write_random_model
from workers.errors import ModelFileError
from workers.gpu.model import GpuModel
from workers.weights.checkpoint import open_checkpoint


def test_weights_are_stacked_and_rounded_once(tmp_path: Path, device: torch.device) -> None:
    path = write_random_model(tmp_path / "model", "qwen2", torch.float16)
    model = GpuModel(open_checkpoint(path), torch.bfloat16, device)
    stored = load_file(path / "model.safetensors", device=device.type)
    layer, prefix = model.layers[1], "model.layers.1"
    names = [f"{prefix}.self_attn.{name}_proj" for name in "qkv"]
    assert torch.equal(layer.qkv.weight, torch.cat([stored[f"{name}.weight"] for name in names]).bfloat16())
    assert layer.qkv.bias is not None
    assert torch.equal(layer.qkv.bias, torch.cat([stored[f"{name}.bias"] for name in names]).bfloat16())
    gate_up = torch.cat([stored[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(layer.gate_up.weight, gate_up.bfloat16())
    assert torch.equal(layer.ffn_norm, stored[f"{prefix}.post_attention_layernorm.weight"].float())
    assert torch.equal(model.head, stored["lm_head.weight"].bfloat16())
    assert model.bytes_per_block(16) == 2 * 2 * 2 * 16 * 16 * 2


def test_weights_that_are_not_finite_are_named(tmp_path: Path, device: torch.device) -> None:
    path = write_random_model(tmp_path / "model", "llama")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(path / "model.safetensors")
    tensors[name][3, 4] = torch.nan
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ModelFileError, match=f"tensor {name}: has numbers that are not finite"):
        GpuModel(open_checkpoint(path), torch.float32, device)
