"""How faithfully weights are packed, and the packing of a checkpoint's tensors under that rule.

    exact   as the file has them: Q4_0, Q4_1, Q8_0 block by block; all else BF16 if that loses nothing, else F32
    bf16    Q4_0, Q4_1, Q8_0 block by block, all else rounded to BF16
    int8    Q4_0, Q4_1, Q8_0 block by block, all else rounded to Q8
    int4    Q4_0, Q4_1 block by block, all else rounded to Q4; embedding and head to no less than Q8

Where rows are no whole groups of 32, or a group's scale is beyond fp16, Q8 and Q4 give way to what `exact` takes. Reads
one part's tensors at a time and keeps none.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from workers.native.packing import (
    GROUP,
    PANEL,
    Array,
    PackedMatrix,
    join,
    pack_bf16,
    pack_f32,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    quantise_q4,
    quantise_q8,
)
from workers.weights.packed import PackedPart, Part, parts

if TYPE_CHECKING:
    from workers.weights.checkpoint import Checkpoint

_PACK_BLOCKS = {"Q4_0": pack_q4_0, "Q4_1": pack_q4_1, "Q8_0": pack_q8_0}
_SLAB_NUMBERS = 1 << 20
"""What packing needs beside the tensor and its result is some copies of so many numbers."""


class PackingMode(enum.StrEnum):
    EXACT = "exact"
    BF16 = "bf16"
    INT8 = "int8"
    INT4 = "int4"


def packing_mode(weights: str, dtype: str) -> PackingMode:
    """Return what `EngineConfig.weights` means beside `EngineConfig.dtype`."""
    if weights != "auto":
        return PackingMode(weights)
    return PackingMode.INT8 if dtype == "int8" else PackingMode.EXACT


def packed_parts(checkpoint: Checkpoint, mode: PackingMode) -> Iterator[tuple[str, PackedPart]]:
    """Yield every part of the model with its name, packed when it is asked for. Raises ModelFileError."""
    for part in parts(checkpoint.shape):
        yield part.name, _vector(checkpoint, part) if part.inputs is None else _matrix(checkpoint, part, mode)


def _vector(checkpoint: Checkpoint, part: Part) -> Array:
    ((tensor, size),) = part.tensors.items()
    return np.ascontiguousarray(checkpoint.array(f"{tensor}.weight", size))


def _matrix(checkpoint: Checkpoint, part: Part, mode: PackingMode) -> PackedMatrix:
    assert part.inputs is not None
    matrix = _pack_blocks(checkpoint, part, mode)
    if matrix is None:
        weights = [checkpoint.array(f"{name}.weight", size, part.inputs) for name, size in part.tensors.items()]
        matrix = _pack_numbers(_ordered(weights, part), part, mode)
    if not part.has_bias:
        return matrix
    biases = [checkpoint.array(f"{name}.bias", size) for name, size in part.tensors.items()]
    return matrix.with_bias(_ordered(biases, part))


def _pack_blocks(checkpoint: Checkpoint, part: Part, mode: PackingMode) -> PackedMatrix | None:
    """Pack quantised tensors as they are; None if they are not all of one kind, or coarser ones are wanted."""
    assert part.inputs is not None
    stored = [checkpoint.quantised(f"{name}.weight", size, part.inputs) for name, size in part.tensors.items()]
    kinds = {None if each is None else each.kind for each in stored}
    kind = kinds.pop()
    if kind is None or kinds or (kind == "Q8_0" and mode is PackingMode.INT4 and not part.is_table):
        return None
    with contextlib.suppress(ValueError):  # a Q4_0 scale so large that its minimum, -8 times as much, is beyond fp16
        return _in_slabs(_ordered([each.rows for each in stored if each is not None], part), _PACK_BLOCKS[kind])
    return None


def _pack_numbers(weight: Array, part: Part, mode: PackingMode) -> PackedMatrix:
    if mode is PackingMode.BF16:
        return _in_slabs(weight, pack_bf16)
    if mode is not PackingMode.EXACT and weight.shape[1] % GROUP == 0:
        quantise = quantise_q4 if mode is PackingMode.INT4 and not part.is_table else quantise_q8
        with contextlib.suppress(ValueError):  # a scale beyond fp16
            return _in_slabs(weight, quantise)
    return _in_slabs(weight, pack_bf16 if _is_bf16(weight) else pack_f32)


def _ordered(rows: Sequence[Array], part: Part) -> Array:
    """Return the rows of several tensors as rows of one part."""
    if len(rows) == 1:
        return rows[0]
    if not part.is_interleaved:
        return np.concatenate(rows)
    panels = np.stack([each.reshape(-1, PANEL, *each.shape[1:]) for each in rows], axis=1)
    return panels.reshape(-1, *rows[0].shape[1:])


def _in_slabs(rows: Array, pack: Callable[[Array], PackedMatrix]) -> PackedMatrix:
    """Pack some panels at a time."""
    step = max(1, _SLAB_NUMBERS // (rows.shape[1] * PANEL)) * PANEL
    slabs = [pack(rows[start : start + step]) for start in range(0, len(rows), step)]
    return slabs[0] if len(slabs) == 1 else join(slabs)


def _is_bf16(weight: Array) -> bool:
    """Whether every number has the low half of its bits zero."""
    step = max(1, _SLAB_NUMBERS // weight.shape[1])
    return not any((weight[at : at + step].view(np.uint32) & 0xFFFF).any() for at in range(0, len(weight), step))
