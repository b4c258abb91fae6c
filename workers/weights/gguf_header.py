"""The header of a GGUF file: metadata and where each tensor lies. Reads no tensor, believes no number.

    magic "GGUF" · version u32 · number of tensors u64 · number of keys u64
    key string, type u32, value                                                per key
    name string, dimensions u32, sizes u64 each, type u32, offset u64          per tensor
    padding to the alignment · tensor data

Every count, length and offset is checked against the size of the file before it is used, so that a corrupt or truncated
file ends in a ModelFileError which says what is wrong and at which byte. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ModelFileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_ARRAY_DEPTH = 4

_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in the file. `size` is outermost dimension first (the file has it innermost first)."""

    name: str
    size: tuple[int, ...]
    type_id: int
    offset: int
    """In bytes from the start of the tensor data."""


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data_start: int
    """Byte of the file at which tensor data begins."""
    alignment: int


def read_header(path: Path) -> GgufHeader:
    """Read and check the header of the file at `path`. Raises ModelFileError."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except ModelFileError as error:
        raise ModelFileError(f"{path.name}: {error}") from error
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise ModelFileError(f"{path.name}: cannot be read: {error}") from error


class _Reader:
    """Walks the header from byte to byte."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0

    def header(self) -> GgufHeader:
        magic = self._bytes(4, "magic number")
        if magic != MAGIC:
            raise ModelFileError(f"not a GGUF file: it begins with {magic!r} instead of {MAGIC!r}")
        version = self._scalar(_U32, "version")
        if version & 0xFFFF == 0:
            raise ModelFileError("big-endian GGUF is not supported")
        if version not in VERSIONS:
            raise ModelFileError(f"GGUF version must be one of {VERSIONS}, is {version}")
        num_tensors = self._count("tensors", smallest=24)
        num_keys = self._count("metadata keys", smallest=13)
        metadata = self._metadata(num_keys)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ModelFileError(f"general.alignment must be a power of two, is {alignment!r}")
        tensors = self._tensors(num_tensors, alignment)
        return GgufHeader(metadata, tensors, -(-self._at // alignment) * alignment, alignment)

    def _metadata(self, num_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(num_keys):
            key = self._string(f"metadata key {index}")
            if key in metadata:
                raise ModelFileError(f"metadata key {key!r} appears twice")
            metadata[key] = self._value(self._scalar(_U32, f"type of {key}"), key, depth=0)
        return metadata

    def _tensors(self, num_tensors: int, alignment: int) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        for index in range(num_tensors):
            name = self._string(f"name of tensor {index}")
            if name in tensors:
                raise ModelFileError(f"tensor {name!r} appears twice")
            dimensions = self._scalar(_U32, f"dimensions of {name}")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise ModelFileError(f"tensor {name!r} must have 1 to {MAX_DIMENSIONS} dimensions, has {dimensions}")
            sizes = [self._scalar(_U64, f"size of {name}") for _ in range(dimensions)]
            if min(sizes) < 1 or math.prod(sizes) >= 1 << 48:
                raise ModelFileError(f"tensor {name!r} has the impossible size {sizes[::-1]}")
            type_id = self._scalar(_U32, f"type of {name}")
            offset = self._scalar(_U64, f"offset of {name}")
            if offset % alignment:
                raise ModelFileError(f"tensor {name!r} begins at {offset}, no multiple of the alignment {alignment}")
            tensors[name] = GgufTensor(name, tuple(sizes[::-1]), type_id, offset)
        return tensors

    def _value(self, type_id: int, key: str, depth: int) -> Any:
        if (scalar := _SCALARS.get(type_id)) is not None:
            return self._scalar(scalar, key)
        if type_id == _STRING:
            return self._string(key)
        if type_id != _ARRAY:
            raise ModelFileError(f"{key} has the unknown metadata type {type_id} at byte {self._at}")
        if depth == MAX_ARRAY_DEPTH:
            raise ModelFileError(f"{key} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        item_type = self._scalar(_U32, f"item type of {key}")
        scalar = _SCALARS.get(item_type)
        count = self._count(f"items of {key}", smallest=scalar.size if scalar else 8)
        if scalar is None:
            return [self._value(item_type, key, depth + 1) for _ in range(count)]
        return list(struct.unpack(f"<{count}{scalar.format[1:]}", self._bytes(count * scalar.size, key)))

    def _count(self, what: str, smallest: int) -> int:
        count: int = self._scalar(_U64, f"number of {what}")
        if count * smallest > self._size - self._at:
            raise ModelFileError(
                f"{count} {what} do not fit into the {self._size} bytes of the file: truncated or corrupt"
            )
        return count

    def _string(self, what: str) -> str:
        length = self._scalar(_U64, f"length of {what}")
        raw = self._bytes(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ModelFileError(f"{what} at byte {self._at - length} is not UTF-8") from None

    def _scalar(self, scalar: struct.Struct, what: str) -> Any:
        return scalar.unpack(self._bytes(scalar.size, what))[0]

    def _bytes(self, count: int, what: str) -> bytes:
        end = self._at + count
        if end > self._size:
            raise ModelFileError(f"truncated: {what} needs bytes {self._at} to {end}, the file has {self._size}")
        raw = self._data[self._at : end]
        self._at = end
        return raw
