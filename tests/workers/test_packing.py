"""Packed panels: what is packed comes back as it was, GGUF's numbers exactly, and rounding is as small as it can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.native.packing import (
    GROUP,
    PANEL,
    Format,
    PackedMatrix,
    join,
    pack_bf16,
    pack_f32,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    quantise_q4,
    quantise_q8,
    unpack,
)

GGUF: dict[GGMLQuantizationType, Callable[[Any], PackedMatrix]] = {
    GGMLQuantizationType.Q4_0: pack_q4_0,
    GGMLQuantizationType.Q4_1: pack_q4_1,
    GGMLQuantizationType.Q8_0: pack_q8_0,
}
# Whole panels, a partial one after whole ones, and less than one.
OUTPUTS = (32, 37, 5)


def weight_of(outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((outputs, inputs)).astype(np.float32)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("kind", GGUF, ids=lambda kind: kind.name)
def test_gguf_blocks_keep_their_numbers_exactly(kind: GGMLQuantizationType, outputs: int) -> None:
    rows = quants.quantize(weight_of(outputs, 96), kind)
    matrix = GGUF[kind](rows)
    assert (matrix.outputs, matrix.inputs) == (outputs, 96)
    np.testing.assert_array_equal(unpack(matrix), quants.dequantize(rows, kind))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_gguf_blocks_keep_every_byte_that_a_file_may_have(data: st.DataObject) -> None:
    """Any integers, and any finite scales: negative, zero and subnormal ones too, and Q8_0's -128."""
    kind = data.draw(st.sampled_from(sorted(GGUF)))
    size = {GGMLQuantizationType.Q4_0: 18, GGMLQuantizationType.Q4_1: 20, GGMLQuantizationType.Q8_0: 34}[kind]
    seed = data.draw(st.integers(0, 2**32 - 1))
    rows = np.random.default_rng(seed).integers(0, 256, (17, 2 * size), dtype=np.uint8)
    halves = st.floats(-8000, 8000, width=16)
    for start in range(0, 2 * size, size):
        for place in range(0, 4 if kind is GGMLQuantizationType.Q4_1 else 2, 2):
            values = np.array(data.draw(st.lists(halves, min_size=17, max_size=17)), dtype="<f2")
            rows[:, start + place : start + place + 2] = values.view(np.uint8).reshape(17, 2)
    np.testing.assert_array_equal(unpack(GGUF[kind](rows)), quants.dequantize(rows, kind))


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("inputs", [1, 33, 64])
def test_floats_of_any_size_come_back(outputs: int, inputs: int) -> None:
    weight = weight_of(outputs, inputs)
    np.testing.assert_array_equal(unpack(pack_f32(weight)), weight)
    np.testing.assert_array_equal(unpack(pack_bf16(weight)), torch.from_numpy(weight).bfloat16().float().numpy())


def test_bf16_rounds_ties_to_even() -> None:
    one, step = 0x3F800000, 0x10000
    bits = np.array([one + step // 2, one + step + step // 2, one + step // 2 + 1], dtype=np.uint32)
    packed = unpack(pack_bf16(bits.view(np.float32)[None]))
    np.testing.assert_array_equal(packed.view(np.uint32)[0], [one, one + 2 * step, one + step])


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_rounding_is_within_half_a_step_of_the_group(outputs: int) -> None:
    weight = weight_of(outputs, 96)
    groups = weight.reshape(outputs, -1, GROUP)
    # Beside half a step, scales and minima are themselves rounded to fp16: 2^-11 of what they stand for.
    largest = np.abs(groups).max(axis=2, keepdims=True)
    span = groups.max(axis=2, keepdims=True) - groups.min(axis=2, keepdims=True)
    eight = np.abs(unpack(quantise_q8(weight)).reshape(groups.shape) - groups)
    four = np.abs(unpack(quantise_q4(weight)).reshape(groups.shape) - groups)
    assert (eight <= largest / 127 / 2 + largest * 2**-11).all()
    assert (four <= span / 15 / 2 + (largest + span) * 2**-11).all()


def test_groups_of_one_value_are_kept() -> None:
    weight = np.repeat(np.array([[0.0, 1.5, -2.25]], dtype=np.float32), GROUP, axis=1)
    np.testing.assert_array_equal(unpack(quantise_q4(weight)), weight)
    np.testing.assert_allclose(unpack(quantise_q8(weight)), weight, rtol=2**-11)


def test_quantising_in_slices_is_quantising_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weight_of(40, 64)
    at_once = quantise_q8(weight).data, quantise_q4(weight).data
    monkeypatch.setattr("workers.native.packing._SLICE", 3 * 64)
    np.testing.assert_array_equal(quantise_q8(weight).data, at_once[0])
    np.testing.assert_array_equal(quantise_q4(weight).data, at_once[1])


@pytest.mark.parametrize("pack", [pack_f32, pack_bf16, quantise_q8, quantise_q4])
def test_panels_are_aligned_and_padded_with_zeros(pack: Callable[[Any], PackedMatrix]) -> None:
    matrix = pack(weight_of(21, 64))
    assert matrix.data.ctypes.data % 64 == 0
    assert matrix.data.size == 2 * matrix.format.panel_bytes(64)
    padded = unpack(dataclasses.replace(matrix, outputs=2 * PANEL))
    np.testing.assert_array_equal(padded[21:], np.zeros((11, 64)))


def test_the_layout_of_q4_is_that_of_the_header() -> None:
    """Byte b of octet j: input 8 j + b in its low nibble, 8 j + 4 + b in its high one."""
    rows = np.zeros((PANEL, 20), dtype=np.uint8)
    rows[3, :4] = np.array([1, 0], dtype="<f2").view(np.uint8)
    rows[3, 4:] = np.arange(16)  # input i is i, input 16 + i is 0
    data = pack_q4_1(rows).data
    octets = data[64:].reshape(4, PANEL, 4)
    assert octets[0, 3].tolist() == [0x40, 0x51, 0x62, 0x73]
    assert octets[1, 3].tolist() == [0xC8, 0xD9, 0xEA, 0xFB]
    assert not octets[2:].any()
    assert not np.delete(octets, 3, axis=1).any()


@pytest.mark.parametrize("pack", [pack_f32, quantise_q4])
def test_joined_matrices_are_stacked(pack: Callable[[Any], PackedMatrix]) -> None:
    weights = [weight_of(outputs, 64, seed) for seed, outputs in enumerate((32, 16, 5))]
    parts = [pack(weight) for weight in weights]
    np.testing.assert_array_equal(unpack(join(parts)), np.concatenate([unpack(part) for part in parts]))


@pytest.mark.parametrize(
    ("act", "rule"),
    [
        (lambda: quantise_q4(weight_of(4, 33)), "multiple of 32, is 33"),
        (lambda: quantise_q8(np.full((1, 32), np.inf, np.float32)), "finite and at most 65504"),
        (lambda: quantise_q8(np.full((1, 32), 1e7, np.float32)), "at most 65504"),
        (lambda: pack_q4_1(np.zeros((2, 21), np.uint8)), r"multiple of 20\], is uint8 \[2, 21\]"),
        (lambda: pack_q8_0(np.zeros((2, 34), np.int8)), "must be uint8"),
        (lambda: pack_f32(weight_of(4, 8)).with_bias(np.zeros(5)), r"4 numbers, is of size \[5\]"),
        (lambda: join([pack_f32(weight_of(5, 8)), pack_f32(weight_of(16, 8))]), "multiples of 16"),
        (lambda: join([pack_f32(weight_of(16, 32)), pack_bf16(weight_of(16, 32))]), "same format"),
    ],
)
def test_what_cannot_be_packed_is_refused(act: Callable[[], object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        act()


def test_a_q4_0_scale_whose_minimum_is_beyond_fp16_is_refused() -> None:
    rows = np.zeros((1, 18), dtype=np.uint8)
    rows[0, :2] = np.array([9000], dtype="<f2").view(np.uint8)
    with pytest.raises(ValueError, match="at most 65504, is 7200"):
        pack_q4_0(rows)


def test_formats_have_the_numbers_of_the_header() -> None:
    assert [(form.name, form.value, form.panel_bytes(64)) for form in Format] == [
        ("F32", 0, 4096),
        ("BF16", 1, 2048),
        ("Q8", 2, 1088),
        ("Q4", 3, 640),
    ]
