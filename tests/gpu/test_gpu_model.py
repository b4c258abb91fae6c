"""Weights on their way to a device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

from tests.workers.random_models import HIDDEN, KV_HEADS, write_random_model
from workers.device import DeviceStep, Ints
from workers.errors import ModelFileError
from workers.gpu import attention
from workers.gpu import device as gpu_device
from workers.gpu.device import PACE
from workers.gpu.mixed import MAX_CHUNKS
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


@pytest.mark.parametrize("num_slots", [6, 600])
def test_graphs_have_their_logits_in_one_place_that_has_room_for_the_largest(
    tmp_path: Path, device: torch.device, num_slots: int
) -> None:
    """As much as slots have rows was too little for the chunks beside few sequences, so that each graph had logits of
    its own, and twice too much for many."""
    model = GpuModel(open_checkpoint(write_random_model(tmp_path / "model", "llama")), torch.float32, device)
    opened = model.open(
        num_blocks=8, block_size=4, num_slots=num_slots, max_model_len=16, chunk_tokens=64, graph_sizes=(1, 3)
    )
    forward, sizes = opened._forward, opened._mixed_sizes.all()
    assert forward is not None
    counts = [*opened.graph_sizes, *(size.samples for size in sizes)]
    assert max(counts) == 4 + MAX_CHUNKS
    places = {forward._logits(torch.zeros(count, HIDDEN, device=device)).data_ptr() for count in counts}
    assert len(places) == 1
    assert len(forward._head_room) == max(counts)
    assert len(forward._logits(torch.zeros(max(counts) + 1, HIDDEN, device=device))) == max(counts) + 1
    opened.close()


@pytest.mark.parametrize("graph_sizes", [(1, 3), ()])
def test_newcomers_wait_for_each_other_after_a_short_step_that_was_no_graph(
    tmp_path: Path, device: torch.device, graph_sizes: tuple[int, ...]
) -> None:
    model = GpuModel(open_checkpoint(write_random_model(tmp_path / "model", "llama")), torch.float32, device)
    opened = model.open(
        num_blocks=8, block_size=4, num_slots=6, max_model_len=16, chunk_tokens=8, graph_sizes=graph_sizes
    )
    assert opened.prefill_interval == 1
    opened.launch(_step_of_one(start=0, count=3)).wait()
    assert opened.prefill_interval == (1 if opened._mixed_sizes.all() else PACE)
    opened.launch(_step_of_one(start=3, count=1)).wait()
    assert opened.prefill_interval == 1
    opened.close()


def _step_of_one(start: int, count: int) -> DeviceStep:
    def ints(number: int) -> Ints:
        return np.array([number], dtype=np.int32)

    return DeviceStep(
        slots=ints(0),
        starts=ints(start),
        counts=ints(count),
        num_chunks=1,
        is_decode=count == 1,
        goes_on=False,
        samples=np.array([True]),
    )


def test_before_any_step_each_kind_of_them_was_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no request waits for a compiler, whatever graphs there are. One step after the other: where kernels are
    interpreted, only one is at a time."""
    monkeypatch.setattr(gpu_device, "NUM_COMPILERS", 1)
    monkeypatch.setattr(attention, "tile_of", lambda num_pairs, *_: (64, 1) if num_pairs >= 3 * KV_HEADS else (32, 1))
    model = GpuModel(
        open_checkpoint(write_random_model(tmp_path / "model", "llama")), torch.float32, torch.device("cpu")
    )
    opened = model.open(num_blocks=8, block_size=4, num_slots=4, max_model_len=16, chunk_tokens=8, graph_sizes=())
    forward, counts = opened._forward, list[int]()
    assert forward is not None
    decode = forward.decode
    monkeypatch.setattr(forward, "decode", lambda rows, count: (counts.append(count), decode(rows, count))[1])
    opened._warm(forward)
    assert sorted(counts) == [1, 2, 3]
    opened.close()
