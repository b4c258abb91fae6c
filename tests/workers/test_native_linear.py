"""The C library's products against float64 products of the same packed weights; both of its builds."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from workers.native import library
from workers.native.packing import (
    GROUP,
    PackedMatrix,
    pack_bf16,
    pack_f32,
    pack_q4_1,
    pack_q8_0,
    quantise_q4,
    quantise_q8,
    unpack,
)

pytestmark = pytest.mark.skipif(library.library() is None, reason="the C library is not built")
both_builds = pytest.mark.parametrize("portable", [0, 1], ids=["best", "portable"])

PACK: dict[str, Callable[[Any], PackedMatrix]] = {
    "f32": pack_f32,
    "bf16": pack_bf16,
    "q8": quantise_q8,
    "q4": quantise_q4,
}
# Every number of rows of a tile and of a last tile, on both sides of each place where a kernel gives way to another.
ROWS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33)
TOLERANCE = 2e-6
"""Of the sum of what products may be: what a sum in fp32 may lose, whatever its order."""


def built() -> ctypes.CDLL:
    found = library.library()
    assert found is not None
    return found


def linear(portable: int, matrix: PackedMatrix, x: np.ndarray, arithmetic: int, *, add: Any = None) -> np.ndarray:
    """Return x * matrix, [rows, outputs], having seen that nothing was written beyond it."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    memory = np.full(len(x) * matrix.outputs + 64, np.nan, dtype=np.float32)
    y = memory[: len(x) * matrix.outputs].reshape(len(x), -1)
    if add is not None:
        y[:] = add
    bias = None if matrix.bias is None else matrix.bias.ctypes.data
    weight = library.Matrix(matrix.data.ctypes.data, bias, int(matrix.format), matrix.outputs, matrix.inputs)
    result = built().octavo_linear(
        portable, ctypes.byref(weight), arithmetic, x.ctypes.data, len(x), add is not None, y.ctypes.data
    )
    assert result == 0
    assert np.isnan(memory[y.size :]).all(), "wrote beyond the last row"
    return y


def rounded(x: np.ndarray) -> np.ndarray:
    """Return x as int8 arithmetic sees it: integers times the scale of their group."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    values = np.empty(x.shape, dtype=np.int8)
    scales, sums = np.empty((2, len(x), x.shape[1] // GROUP), dtype=np.float32)
    for row in range(len(x)):
        built().octavo_round_row(
            0,
            x[row].ctypes.data,
            x.shape[1],
            values[row].ctypes.data,
            scales[row].ctypes.data,
            sums[row].ctypes.data,
        )
    groups = values.reshape(len(x), -1, GROUP).astype(np.float64) * scales[..., None]
    return groups.reshape(x.shape)


def assert_product(portable: int, matrix: PackedMatrix, x: np.ndarray, arithmetic: int) -> None:
    y = linear(portable, matrix, x, arithmetic)
    is_rounded = arithmetic == library.INT8 and matrix.format.name in ("Q8", "Q4")
    seen = rounded(x) if is_rounded else x.astype(np.float64)
    weight = unpack(matrix).astype(np.float64)
    assert y.shape == (len(x), matrix.outputs)
    error = np.abs(y - seen @ weight.T)
    assert (error <= TOLERANCE * (np.abs(seen) @ largest(matrix, weight).T) + 1e-30).all()


def largest(matrix: PackedMatrix, weight: np.ndarray) -> np.ndarray:
    """Return the absolute values that a weight may have: where groups share a scale and a minimum, which are multiplied
    apart from the integers, the largest of its group."""
    if matrix.format.name in ("F32", "BF16"):
        return np.abs(weight)
    return np.repeat(np.abs(weight).reshape(len(weight), -1, GROUP).max(axis=2), GROUP, axis=1)


def normal(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng((*size, seed)).standard_normal(size).astype(np.float32)


@both_builds
@pytest.mark.parametrize("arithmetic", [library.EXACT, library.INT8], ids=["exact", "int8"])
@pytest.mark.parametrize("name", PACK)
def test_every_size(portable: int, name: str, arithmetic: int) -> None:
    """Whole and partial panels, one group and several; floats also have inputs that no group divides."""
    odd_inputs = [1, 3, 61] if name in ("f32", "bf16") else []
    for inputs in (GROUP, 3 * GROUP, *odd_inputs):
        for outputs in (1, 15, 16, 17, 40):
            matrix = PACK[name](normal(outputs, inputs))
            for rows in ROWS:
                assert_product(portable, matrix, normal(rows, inputs, seed=1), arithmetic)


@both_builds
@pytest.mark.parametrize("arithmetic", [library.EXACT, library.INT8], ids=["exact", "int8"])
@pytest.mark.parametrize("name", PACK)
def test_more_rows_than_a_core_keeps_at_hand(portable: int, name: str, arithmetic: int) -> None:
    matrix = PACK[name](normal(33, 1536))
    assert_product(portable, matrix, normal(141, 1536, seed=1), arithmetic)


@both_builds
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 33])
def test_the_largest_integers_do_not_overflow(portable: int, rows: int) -> None:
    """All nibbles 15 and all bytes 127 or -128, with activations that all round to 127 or -127."""
    q4 = np.full((16, 3 * 20), 255, dtype=np.uint8)
    q4.reshape(16, 3, 20)[:, :, :4] = np.array([1, -7.5], dtype="<f2").view(np.uint8)
    for integer in (127, -128):
        q8 = np.full((16, 3 * 34), np.uint8(integer & 255), dtype=np.uint8)
        q8.reshape(16, 3, 34)[:, :, :2] = np.array([1], dtype="<f2").view(np.uint8)
        for sign in (1, -1):
            for matrix in (pack_q4_1(q4), pack_q8_0(q8)):
                x = np.full((rows, 96), 3.5 * sign, dtype=np.float32)
                assert_product(portable, matrix, x, library.INT8)
                assert_product(portable, matrix, x, library.EXACT)


@both_builds
@pytest.mark.parametrize("arithmetic", [library.EXACT, library.INT8], ids=["exact", "int8"])
@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("rows", [1, 6, 17])
def test_uneven_activations(portable: int, name: str, arithmetic: int, rows: int) -> None:
    """An outlier in one group and rows of zeros: other groups and rows know nothing of them."""
    x = normal(rows, 96)
    x[0, 40] = 3e4
    x[rows // 2, :64] = 0
    x[-1] = 0
    matrix = PACK[name](normal(24, 96))
    assert_product(portable, matrix, x, arithmetic)
    np.testing.assert_array_equal(linear(portable, matrix, x, arithmetic)[-1], np.zeros(24))


@both_builds
@pytest.mark.parametrize("arithmetic", [library.EXACT, library.INT8], ids=["exact", "int8"])
@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("rows", [1, 3, 18])
def test_bias_and_what_is_there_are_added(portable: int, name: str, arithmetic: int, rows: int) -> None:
    matrix, x = PACK[name](normal(21, 64)), normal(rows, 64)
    plain, bias, there = linear(portable, matrix, x, arithmetic), normal(21), normal(rows, 21, seed=2)
    with_bias = linear(portable, matrix.with_bias(bias), x, arithmetic)
    np.testing.assert_array_equal(with_bias, plain + bias)
    np.testing.assert_array_equal(linear(portable, matrix, x, arithmetic, add=there), plain + there)
    np.testing.assert_array_equal(
        linear(portable, matrix.with_bias(bias), x, arithmetic, add=there), (plain + bias) + there
    )


@both_builds
@pytest.mark.parametrize("name", PACK)
def test_an_output_does_not_depend_on_the_others(portable: int, name: str) -> None:
    """The first panel alone gives the same bits as in a larger matrix, so tiles may be cut anywhere."""
    weight, x = normal(64, 96), normal(5, 96)
    whole = linear(portable, PACK[name](weight), x, library.EXACT)
    np.testing.assert_array_equal(linear(portable, PACK[name](weight[:16]), x, library.EXACT), whole[:, :16])


@both_builds
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("rows", [1, 4, 20])
def test_what_is_not_finite_stays_seen(portable: int, value: float, name: str, rows: int) -> None:
    x = normal(rows, 64)
    x[rows - 1, 33] = value
    y = linear(portable, PACK[name](np.abs(normal(16, 64)) + 1), x, library.EXACT)
    assert not np.isfinite(y[-1]).any()
    assert np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("name", PACK)
def test_rows_of_an_embedding(name: str) -> None:
    """A model without layers: logits are a row of the embedding, normalised, times the identity."""
    hidden = vocab = 64
    embedding = PACK[name](normal(vocab, hidden))
    identity, ones = pack_f32(np.eye(vocab, hidden, dtype=np.float32)), np.ones(hidden, dtype=np.float32)
    tokens, logits = np.array([0, 17, 63], dtype=np.int32), np.empty((3, vocab), dtype=np.float32)
    run_without_layers(embedding, identity, ones, tokens, logits)
    rows = unpack(embedding)[tokens].astype(np.float64)
    expected = rows / np.sqrt((rows**2).mean(axis=1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-7)


def run_without_layers(
    embedding: PackedMatrix, head: PackedMatrix, norm: np.ndarray, tokens: np.ndarray, logits: np.ndarray
) -> None:
    def field(matrix: PackedMatrix) -> library.Matrix:
        return library.Matrix(matrix.data.ctypes.data, None, int(matrix.format), matrix.outputs, matrix.inputs)

    keys, frequencies = np.zeros(2 * 16 * 64, dtype=np.float32), np.ones(16, dtype=np.float32)
    model = library.Model(
        hidden=embedding.inputs,
        num_layers=0,
        num_heads=2,
        num_kv_heads=1,
        head_dim=32,
        ffn=32,
        vocab=embedding.outputs,
        arithmetic=library.EXACT,
        norm_eps=1e-5,
        norm=norm.ctypes.data,
        frequencies=frequencies.ctypes.data,
        embedding=field(embedding),
        head=field(head),
        layers=(library.Layer * 1)(),
    )
    cache = library.Cache(keys.ctypes.data, library.CACHE_F32, 1, 16)
    rows, table = np.arange(len(tokens), dtype=np.int32), np.zeros(1, dtype=np.int32)
    chunk, best = library.Chunk(0, len(tokens), 0, 0), np.empty(len(tokens), dtype=np.int32)
    step = library.Step(
        num_rows=len(tokens),
        num_chunks=1,
        num_sampling=len(tokens),
        tokens=tokens.ctypes.data,
        chunks=ctypes.addressof(chunk),
        tables=table.ctypes.data,
        sampling=rows.ctypes.data,
        logits=logits.ctypes.data,
        best=best.ctypes.data,
    )
    context = built().octavo_open(ctypes.byref(model), ctypes.byref(cache), 2)
    assert context
    try:
        assert built().octavo_run(context, ctypes.byref(step)) == 0
    finally:
        built().octavo_close(context)
    np.testing.assert_array_equal(best, logits.argmax(axis=1))
