"""A packed model as one file that every replica of a node maps: written once, then only read.

    0     magic, version u32, 0 u32, where the index is u64 and its size u64, SHA-256 of the index     64 bytes
    64    arrays, each at a multiple of 64 bytes
    end   index: JSON {"key": .., "shape": .., "parts": [..]}; the file ends with it

The index comes last because formats are known only once the tensors have been read; the first 64 bytes are written
after everything else, so that half a file is none. `read_packed` believes no number that it has not checked: a mapping
beyond the end of a file would kill the process. Bits that flip inside the arrays are not noticed.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from workers.errors import ModelFileError
from workers.native.packing import (
    ALIGNMENT,
    GROUP,
    PANEL,
    Array,
    Format,
    PackedMatrix,
    num_panels,
    pack_bf16,
    pack_f32,
    quantise_q4,
    quantise_q8,
)
from workers.weights.packed import PackedModel, PackedPart, Part, UnpackableError, assemble, parts
from workers.weights.packed_mode import PackingMode
from workers.weights.shape import ModelShape, Rope

MAGIC = b"OCTAPACK"
VERSION = 1
_HEAD = struct.Struct("<8sIIQQ32s")
assert _HEAD.size == ALIGNMENT


class UnusableFileError(Exception):
    """The file is cut, damaged, of another release or of another model; says which."""


@dataclass(frozen=True, slots=True)
class PackedKey:
    """What a packed file holds: which weights, under which rule."""

    weights_fingerprint: str
    mode: PackingMode

    def to_json(self) -> dict[str, str]:
        return {"weights": self.weights_fingerprint, "mode": str(self.mode), "packing": packing_fingerprint()}


@functools.cache
def packing_fingerprint() -> str:
    """Return a text that changes when the panels do: what `packing` makes of a small matrix."""
    weight = np.linspace(-1, 1, (PANEL + 1) * 2 * GROUP, dtype=np.float32).reshape(PANEL + 1, 2 * GROUP)
    digest = hashlib.sha256()
    for pack in (pack_f32, pack_bf16, quantise_q8, quantise_q4):
        digest.update(pack(weight).data.tobytes())
    return digest.hexdigest()[:16]


def write_packed(path: Path, key: PackedKey, shape: ModelShape, packed: Iterable[tuple[str, PackedPart]]) -> int:
    """Write a model to `path`, one part at a time; return the bytes written. They are on the disk when this returns.

    Raises OSError, and whatever `packed` raises; the file is no packed model then.
    """
    with path.open("wb") as file:
        file.write(bytes(_HEAD.size))
        entries = [_write_part(file, name, part) for name, part in packed]
        index = json.dumps({"key": key.to_json(), "shape": dataclasses.asdict(shape), "parts": entries}).encode()
        at = file.tell()
        file.write(index)
        size = file.tell()
        file.seek(0)
        file.write(_HEAD.pack(MAGIC, VERSION, 0, at, len(index), hashlib.sha256(index).digest()))
        file.flush()
        os.fsync(file.fileno())
    return size


def read_packed(path: Path, key: PackedKey) -> PackedModel:
    """Map the model at `path`. Raises OSError and UnusableFileError."""
    try:
        with path.open("rb") as file:
            index, end = _read_index(file)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if index["key"] != key.to_json():
            raise UnusableFileError(f"holds {index['key']}")
        shape = _shape(index["shape"])
        packed = {}
        for part, entry in zip(parts(shape), index["parts"], strict=True):
            if entry["name"] != part.name:
                raise UnusableFileError(f"has {entry['name']!r} where {part.name!r} must be")
            packed[part.name] = _map_part(mapping, end, part, entry)
        mapping.madvise(mmap.MADV_WILLNEED)
        return assemble(shape, packed)
    except (KeyError, TypeError, ValueError, ModelFileError, UnpackableError) as error:
        raise UnusableFileError(f"has an index that this release did not write: {error!r}") from error


def _write_part(file: BinaryIO, name: str, part: PackedPart) -> Mapping[str, object]:
    if not isinstance(part, PackedMatrix):
        return {"name": name, "at": _write_array(file, part)}
    bias = None if part.bias is None else _write_array(file, part.bias)
    return {"name": name, "format": part.format.name, "at": _write_array(file, part.data), "bias_at": bias}


def _write_array(file: BinaryIO, array: Array) -> int:
    at = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(at)
    file.write(array.data)
    return at


def _read_index(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the index and where it begins."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        raise UnusableFileError(f"has only {size} bytes")
    magic, version, _, at, index_size, digest = _HEAD.unpack(head)
    if magic != MAGIC:
        raise UnusableFileError(f"begins with {magic!r}")
    if version != VERSION:
        raise UnusableFileError(f"is of version {version}, this release reads {VERSION}")
    if at + index_size != size:
        raise UnusableFileError(f"has {size} bytes, was written with {at + index_size}")
    file.seek(at)
    raw = file.read(index_size)
    if hashlib.sha256(raw).digest() != digest:
        raise UnusableFileError("has a damaged index")
    index: dict[str, Any] = json.loads(raw)
    return index, at


def _shape(fields: Mapping[str, Any]) -> ModelShape:
    rope = Rope(**fields["rope"] | {"divisors": tuple(fields["rope"]["divisors"])})
    return ModelShape(**{**fields, "rope": rope})


def _map_part(mapping: mmap.mmap, end: int, part: Part, entry: Mapping[str, Any]) -> PackedPart:
    def array(at: int, dtype: type[np.generic], count: int) -> Array:
        num_bytes = count * np.dtype(dtype).itemsize
        if at % ALIGNMENT or not _HEAD.size <= at <= end - num_bytes:
            raise UnusableFileError(f"has {part.name!r} at byte {at}, {num_bytes} bytes long, of {end}")
        return np.frombuffer(mapping, dtype, count, at)

    if part.inputs is None:
        return array(entry["at"], np.float32, part.outputs)
    form = Format[entry["format"]]
    if form in (Format.Q8, Format.Q4) and part.inputs % GROUP:
        raise UnusableFileError(f"has {part.name!r} in {form.name} with {part.inputs} inputs")
    data = array(entry["at"], np.uint8, num_panels(part.outputs) * form.panel_bytes(part.inputs))
    if (entry["bias_at"] is not None) != part.has_bias:
        raise UnusableFileError(f"has a bias where {part.name!r} has none, or none where it has one")
    bias = array(entry["bias_at"], np.float32, part.outputs) if part.has_bias else None
    return PackedMatrix(form, part.outputs, part.inputs, data, bias)
