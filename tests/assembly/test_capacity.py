"""The arithmetic of `octavo plan`, in numbers that fit on a page."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.capacity import (
    BF16,
    FP32,
    INT4,
    INT8,
    Demand,
    Prediction,
    Speed,
    balanced_rows,
    demand,
    has_groups,
    kv_bytes_per_token,
    num_fitting,
    predict,
)
from cluster.devices import DEVICES, find_device
from workers.errors import ConfigError
from workers.weights.shape import ModelShape, Rope

SHAPE = ModelShape(
    architecture="llama",
    vocab_size=100,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=96,
    max_positions=256,
    rope=Rope(),
    norm_eps=1e-5,
    tied_embeddings=True,
    qk_norm=False,
    qkv_bias=False,
    output_bias=False,
    ffn_bias=False,
)
# qkv 128 x 64, output 64 x 64, gate and up 192 x 64, down 64 x 96
LAYER = 8_192 + 4_096 + 12_288 + 6_144
HEAD = 100 * 64
PADDED_HEAD = 112 * 64


@pytest.mark.parametrize(
    ("weights", "layer_bytes", "head_bytes"),
    [
        (FP32, LAYER * 4, PADDED_HEAD * 4),
        (BF16, LAYER * 2, PADDED_HEAD * 2),
        (INT8, LAYER * 544 // 512, PADDED_HEAD * 544 // 512),
        (INT4, LAYER * 320 // 512, PADDED_HEAD * 544 // 512),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_weights_take_what_their_format_says(weights: object, layer_bytes: int, head_bytes: int) -> None:
    assert weights in (FP32, BF16, INT8, INT4)
    needed = demand(SHAPE, weights, "fp16")  # type: ignore[arg-type]  # seen above
    assert needed.num_parameters == 3 * LAYER + HEAD
    assert needed.weight_bytes == needed.resident_bytes == 3 * layer_bytes + head_bytes
    untied = demand(dataclasses.replace(SHAPE, tied_embeddings=False), weights, "fp16")  # type: ignore[arg-type]
    assert untied.weight_bytes == needed.weight_bytes, "of the embedding a step reads a row for each token"
    assert untied.resident_bytes == needed.weight_bytes + head_bytes


def test_a_token_takes_keys_and_values_of_every_layer_in_the_type_of_the_cache() -> None:
    assert kv_bytes_per_token(SHAPE, "fp32") == 3 * 2 * 2 * 16 * 4
    assert kv_bytes_per_token(SHAPE, "fp16") == kv_bytes_per_token(SHAPE, "bf16") == 3 * 2 * 2 * 16 * 2


def test_a_step_reads_weights_once_and_the_cache_of_every_row() -> None:
    needed = demand(SHAPE, BF16, "fp16")
    assert needed.num_bytes(1, 0) == needed.num_bytes(8, 0) == needed.weight_bytes
    assert needed.num_bytes(8, 10) == needed.weight_bytes + 80 * 384
    assert needed.num_operations(8, 0) == 8 * 2 * (3 * LAYER + HEAD)
    # Four heads of 16 in three layers: a product with the key, and one with the value.
    assert needed.num_operations(8, 10) - needed.num_operations(8, 0) == 8 * 10 * 2 * 2 * 4 * 16 * 3


def test_the_slower_of_reading_and_computing_is_the_prediction() -> None:
    needed = Demand(
        num_parameters=1_000, weight_bytes=4_000, resident_bytes=4_000, kv_bytes_per_token=100, attention_operations=50
    )
    speed = Speed(bytes_per_s=1e6, operations_per_s=2e6)
    assert balanced_rows(needed, speed) == 4.0
    assert predict(needed, speed, rows=(1, 4, 8), context=0) == (
        Prediction(1, 4.0, "memory"),
        Prediction(4, 4.0, "memory"),
        Prediction(8, 8.0, "compute"),
    )
    # With the cache of a context to read, more rows no longer compute for long enough to hide it.
    assert predict(needed, speed, rows=(8,), context=100) == (Prediction(8, 84.0, "memory"),)


def test_only_whole_sequences_fit() -> None:
    assert [num_fitting(num_blocks, 16, 20) for num_blocks in (1, 2, 3, 4)] == [0, 1, 1, 2]


def test_groups_are_asked_of_every_matrix() -> None:
    assert has_groups(SHAPE)
    assert not has_groups(dataclasses.replace(SHAPE, ffn_size=80))
    assert not has_groups(dataclasses.replace(SHAPE, hidden_size=80))


def test_a_data_sheet_is_found_by_its_name() -> None:
    assert find_device("H100").memory_gb == 80
    assert all(device.tflops > 0 and device.gb_per_s > 0 and device.source for device in DEVICES.values())
    with pytest.raises(ConfigError, match=r"--device must be one of a10, .*rtx4090, is 'h1000'"):
        find_device("h1000")
