"""Weights laid out as the C library multiplies with them (`octavo.h`): panels of 16 outputs, groups of 32 inputs.

    F32, BF16   [panel, input, 16]
    Q8          [panel, group] of  scale[16] fp16 | 8 quads x 16 outputs x 4 B, each 128 more than the weight's integer
    Q4          [panel, group] of  scale[16] fp16 | minimum[16] fp16 | 4 octets x 16 outputs x 4 B
                byte b of octet j: input 8 j + b in its low nibble, input 8 j + 4 + b in its high one

GGUF blocks are packed without loss: their scales and integers are moved, never rounded again. Needs numpy alone; knows
arrays and bytes, no files, no names of tensors, no model.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

PANEL = 16
GROUP = 32
ALIGNMENT = 64
_MAX_FP16 = 65504.0
# Quantising works on so many weights at a time: what it needs beside its result does not grow with the matrix.
_SLICE = 1 << 21

Array = npt.NDArray[Any]


class Format(enum.IntEnum):
    F32 = 0
    BF16 = 1
    Q8 = 2
    Q4 = 3

    def panel_bytes(self, inputs: int) -> int:
        """Return the bytes of one packed panel."""
        match self:
            case Format.F32:
                return inputs * PANEL * 4
            case Format.BF16:
                return inputs * PANEL * 2
            case Format.Q8:
                return inputs // GROUP * _Q8_GROUP.itemsize
            case Format.Q4:
                return inputs // GROUP * _Q4_GROUP.itemsize


# The words are little-endian, so that the first input is a word's lowest byte on every machine.
_Q8_GROUP = np.dtype([("scale", "<f2", (PANEL,)), ("words", "<u4", (8, PANEL))])
_Q4_GROUP = np.dtype([("scale", "<f2", (PANEL,)), ("minimum", "<f2", (PANEL,)), ("words", "<u4", (4, PANEL))])
_Q8_0_BLOCK = np.dtype([("scale", "<f2"), ("words", "<u4", (8,))])
_Q4_0_BLOCK = np.dtype([("scale", "<f2"), ("words", "<u4", (4,))])
_Q4_1_BLOCK = np.dtype([("scale", "<f2"), ("minimum", "<f2"), ("words", "<u4", (4,))])


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """A weight [outputs, inputs]. `data` is uint8, contiguous and 64-byte aligned; `bias` is fp32 [outputs]."""

    format: Format
    outputs: int
    inputs: int
    data: npt.NDArray[np.uint8]
    bias: npt.NDArray[np.float32] | None = None

    @property
    def num_panels(self) -> int:
        return num_panels(self.outputs)

    def with_bias(self, bias: Array) -> PackedMatrix:
        """Return the matrix with this bias [outputs]. Raises ValueError for another size."""
        if bias.shape != (self.outputs,):
            raise ValueError(f"bias must have {self.outputs} numbers, is of size {list(bias.shape)}")
        return replace(self, bias=np.ascontiguousarray(bias, dtype=np.float32))


def num_panels(outputs: int) -> int:
    return -(-outputs // PANEL)


def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """Return `size` zero bytes at an address that is a multiple of 64."""
    memory = np.zeros(size + ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size]


def pack_f32(weight: Array) -> PackedMatrix:
    """Pack [outputs, inputs] as fp32."""
    matrix, panels = _empty(Format.F32, *weight.shape)
    _spread(weight, panels.view("<f4").reshape(matrix.num_panels, -1, PANEL))
    return matrix


def pack_bf16(weight: Array) -> PackedMatrix:
    """Pack [outputs, inputs] rounded to bf16, ties to even."""
    matrix, panels = _empty(Format.BF16, *weight.shape)
    bits = np.ascontiguousarray(weight, dtype="<f4").view("<u4")
    rounded = (bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16
    _spread(rounded, panels.view("<u2").reshape(matrix.num_panels, -1, PANEL))
    return matrix


def pack_q8_0(rows: Array) -> PackedMatrix:
    """Pack GGUF's Q8_0: uint8 [outputs, bytes], 34 bytes for 32 inputs."""
    blocks = _blocks(rows, _Q8_0_BLOCK)
    return _pack_q8(blocks["scale"], blocks["words"])


def pack_q4_0(rows: Array) -> PackedMatrix:
    """Pack GGUF's Q4_0: uint8 [outputs, bytes], 18 bytes for 32 inputs. weight = d (nibble - 8) = d nibble - 8 d.

    Raises ValueError if -8 d is beyond fp16.
    """
    blocks = _blocks(rows, _Q4_0_BLOCK)
    return _pack_q4(blocks["scale"], _as_fp16(blocks["scale"].astype(np.float32) * -8), blocks["words"])


def pack_q4_1(rows: Array) -> PackedMatrix:
    """Pack GGUF's Q4_1: uint8 [outputs, bytes], 20 bytes for 32 inputs. weight = d nibble + m."""
    blocks = _blocks(rows, _Q4_1_BLOCK)
    return _pack_q4(blocks["scale"], blocks["minimum"], blocks["words"])


def quantise_q8(weight: Array) -> PackedMatrix:
    """Round fp32 [outputs, inputs] to 8 bits: the largest absolute value of a group is 127 steps.

    Raises ValueError if inputs is no multiple of 32 or a step is beyond fp16.
    """
    groups = _grouped(weight)
    scale = np.empty(groups.shape[:2], dtype="<f2")
    integers = np.empty(groups.shape, dtype=np.int8)
    for part in _slices(groups):
        scale[part] = _as_fp16(np.abs(groups[part]).max(axis=2) / 127)
        integers[part] = np.clip(np.rint(_steps(groups[part], scale[part])), -127, 127)
    return _pack_q8(scale, integers.view("<u4"))


def quantise_q4(weight: Array) -> PackedMatrix:
    """Round fp32 [outputs, inputs] to 4 bits: a group's smallest value is 0 steps, its largest 15.

    Raises ValueError if inputs is no multiple of 32 or a minimum or step is beyond fp16.
    """
    groups = _grouped(weight)
    scale = np.empty(groups.shape[:2], dtype="<f2")
    minimum = np.empty(groups.shape[:2], dtype="<f2")
    nibbles = np.empty(groups.shape, dtype=np.uint8)
    for part in _slices(groups):
        minimum[part] = _as_fp16(groups[part].min(axis=2))
        above = groups[part] - minimum[part].astype(np.float32)[..., None]
        scale[part] = _as_fp16(above.max(axis=2) / 15)
        nibbles[part] = np.clip(np.rint(_steps(above, scale[part])), 0, 15)
    low, high = nibbles[..., :16], nibbles[..., 16:]
    return _pack_q4(scale, minimum, (low | (high << 4)).view("<u4"))


def join(matrices: Sequence[PackedMatrix]) -> PackedMatrix:
    """Return the outputs of all matrices one after another, as one matrix without a bias.

    Raises ValueError if formats or inputs differ, or one before the last has a partial panel.
    """
    first = matrices[0]
    if any((matrix.format, matrix.inputs) != (first.format, first.inputs) for matrix in matrices):
        raise ValueError("matrices to join must have the same format and inputs")
    if any(matrix.outputs % PANEL for matrix in matrices[:-1]):
        raise ValueError(f"outputs of matrices to join must be multiples of {PANEL}")
    joined, panels = _empty(first.format, sum(matrix.outputs for matrix in matrices), first.inputs)
    np.concatenate([matrix.data for matrix in matrices], out=panels)
    return joined


def unpack(matrix: PackedMatrix) -> npt.NDArray[np.float32]:
    """Return the weight [outputs, inputs] as the kernels multiply with it, exactly."""
    shape = (matrix.num_panels, -1, PANEL)
    match matrix.format:
        case Format.F32:
            weights = matrix.data.view("<f4").reshape(shape)
        case Format.BF16:
            weights = (matrix.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
        case Format.Q8:
            groups = matrix.data.view(_Q8_GROUP)
            integers = groups["words"].copy().view(np.uint8).reshape(-1, 8, PANEL, 4).swapaxes(2, 3)
            signed = integers.reshape(-1, GROUP, PANEL).astype(np.float32) - 128
            weights = (groups["scale"].astype(np.float32)[:, None] * signed).reshape(shape)
        case Format.Q4:
            groups = matrix.data.view(_Q4_GROUP)
            octets = groups["words"].copy().view(np.uint8).reshape(-1, 4, PANEL, 4).swapaxes(2, 3)
            nibbles = np.stack([octets & 15, octets >> 4], axis=2).reshape(-1, GROUP, PANEL).astype(np.float32)
            scale, minimum = groups["scale"].astype(np.float32), groups["minimum"].astype(np.float32)
            weights = (scale[:, None] * nibbles + minimum[:, None]).reshape(shape)
    rows = weights.swapaxes(1, 2).reshape(matrix.num_panels * PANEL, matrix.inputs)
    return np.ascontiguousarray(rows[: matrix.outputs], dtype=np.float32)


def _pack_q8(scale: Array, words: Array) -> PackedMatrix:
    """`scale` [outputs, groups] and four int8 in each of `words` [outputs, groups, 8]."""
    outputs, num_groups = scale.shape
    matrix, panels = _empty(Format.Q8, outputs, num_groups * GROUP)
    groups = panels.view(_Q8_GROUP).reshape(matrix.num_panels, num_groups)
    _spread(scale, groups["scale"])
    # Adding 128 to a byte, modulo 256, flips its highest bit.
    _spread(words ^ np.uint32(0x80808080), groups["words"])
    return matrix


def _pack_q4(scale: Array, minimum: Array, words: Array) -> PackedMatrix:
    """`words` [outputs, groups, 4] are ggml's 16 bytes: byte i has input i in its low nibble, i + 16 in its high one.

    word     0         1         2         3
    low      0 ..  3   4 ..  7   8 .. 11  12 .. 15      octets 0 and 1
    high    16 .. 19  20 .. 23  24 .. 27  28 .. 31      octets 2 and 3
    """
    outputs, num_groups = scale.shape
    matrix, panels = _empty(Format.Q4, outputs, num_groups * GROUP)
    groups = panels.view(_Q4_GROUP).reshape(matrix.num_panels, num_groups)
    _spread(scale, groups["scale"])
    _spread(minimum, groups["minimum"])
    low, high = np.uint32(0x0F0F0F0F), np.uint32(0xF0F0F0F0)
    first, second = words[..., 0::2], words[..., 1::2]
    _spread((first & low) | ((second & low) << 4), groups["words"][:, :, 0:2])
    _spread(((first & high) >> 4) | (second & high), groups["words"][:, :, 2:4])
    return matrix


def _spread(rows: Array, panels: Array) -> None:
    """Copy [outputs, ...] to [panel, ..., 16]; outputs that a last, partial panel lacks are left as they are."""
    whole, rest = divmod(len(rows), PANEL)
    inner = rows.shape[1:]
    np.copyto(
        panels[:whole], np.moveaxis(rows[: whole * PANEL].reshape(whole, PANEL, *inner), 1, -1), casting="same_kind"
    )
    if rest:
        np.copyto(panels[whole, ..., :rest], np.moveaxis(rows[whole * PANEL :], 0, -1), casting="same_kind")


def _empty(form: Format, outputs: int, inputs: int) -> tuple[PackedMatrix, npt.NDArray[np.uint8]]:
    data = aligned_bytes(num_panels(outputs) * form.panel_bytes(inputs))
    return PackedMatrix(form, outputs, inputs, data), data


def _blocks(rows: Array, block: np.dtype[Any]) -> Array:
    """View the bytes of each row as blocks. Raises ValueError if a row is not made of whole ones."""
    if rows.dtype != np.uint8 or rows.ndim != 2 or rows.shape[1] % block.itemsize:
        raise ValueError(
            f"rows must be uint8 [outputs, a multiple of {block.itemsize}], is {rows.dtype} {list(rows.shape)}"
        )
    return np.ascontiguousarray(rows).view(block)


def _grouped(weight: Array) -> npt.NDArray[np.float32]:
    outputs, inputs = weight.shape
    if inputs % GROUP:
        raise ValueError(f"inputs must be a multiple of {GROUP}, is {inputs}")
    return np.ascontiguousarray(weight, dtype=np.float32).reshape(outputs, inputs // GROUP, GROUP)


def _slices(groups: Array) -> list[slice]:
    step = max(1, _SLICE // (groups.shape[1] * GROUP))
    return [slice(start, start + step) for start in range(0, len(groups), step)]


def _steps(values: Array, scale: Array) -> Array:
    """Divide [.., groups, 32] by the scale [.., groups] as it will be read; where that is 0, nothing is a step."""
    divisor = scale.astype(np.float32)[..., None]
    return np.divide(values, divisor, out=np.zeros_like(values), where=divisor > 0)


def _as_fp16(values: Array) -> Array:
    """Raises ValueError for a number that fp16 has no room for."""
    if not (np.abs(values) <= _MAX_FP16).all():
        raise ValueError(f"scales and minima must be finite and at most {_MAX_FP16:.0f}, is {np.abs(values).max()}")
    return values.astype("<f2")
