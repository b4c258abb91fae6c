"""Reads the header of a GGUF file: its metadata and where its tensors lie. Reads no weights.

Everything is checked against the file's real size before it is used, so that a corrupt or truncated file is refused
with its name, the rule and the value instead of failing later in a worker. Format: the GGUF specification of ggml,
versions 2 and 3, little endian.

    "GGUF" version num_tensors num_keys | key type value ... | name dims type offset ... | padding | tensor data ...
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ModelFileError

SCALARS = {
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
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

U32, U64 = SCALARS[4], SCALARS[10]


@dataclass(frozen=True, slots=True)
class TensorEntry:
    name: str
    shape: tuple[int, ...]
    """As stored: the fastest varying dimension first."""
    type_number: int
    offset: int
    """In bytes from the beginning of the tensor data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[TensorEntry, ...]
    header_bytes: int
    """Where the tensor data begins."""
    file_bytes: int

    def refuse(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {message}")


def read_header(path: Path) -> GgufHeader:
    """Return the header of the file at `path`. Raises ModelFileError."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size < 24:
                raise ModelFileError(f"{path}: a GGUF file has at least 24 bytes, this one has {size}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error


class _Reader:
    """A cursor over the mapped file that never reads past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def header(self) -> GgufHeader:
        magic = self._data[:4]
        if magic != b"GGUF":
            raise self._error(f"a GGUF file begins with b'GGUF', this one with {magic!r}")
        self._at = 4
        version = self._scalar(U32)
        if version not in (2, 3):
            raise self._error(f"GGUF versions 2 and 3 (little endian) are read, this file says {version}")
        num_tensors, num_keys = self._scalar(U64), self._scalar(U64)
        self._check_count("number of tensors", num_tensors, 24)
        self._check_count("number of metadata keys", num_keys, 13)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            metadata[key] = self._value(self._scalar(U32), key)
        tensors = tuple(self._tensor() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise self._error(f"general.alignment must be a power of two, is {alignment!r}")
        return GgufHeader(
            path=self._path,
            metadata=metadata,
            tensors=tensors,
            header_bytes=-(-self._at // alignment) * alignment,
            file_bytes=self._size,
        )

    def _error(self, message: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {message}")

    def _take(self, count: int) -> int:
        """Step over `count` bytes and return where they began."""
        start = self._at
        if count > self._size - start:
            raise self._error(f"is truncated or corrupt: {count} bytes expected at {start}, the file has {self._size}")
        self._at = start + count
        return start

    def _check_count(self, what: str, count: int, least_bytes: int) -> None:
        """Refuse a count that the rest of the file cannot hold, before memory is spent on it."""
        if count * least_bytes > self._size - self._at:
            raise self._error(f"is truncated or corrupt: {what} is {count}, {self._size - self._at} bytes are left")

    def _scalar(self, kind: struct.Struct) -> Any:
        return kind.unpack_from(self._data, self._take(kind.size))[0]

    def _string(self) -> str:
        length = self._scalar(U64)
        start = self._take(length)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise self._error(f"is corrupt: the text at {start} is not UTF-8") from error

    def _value(self, kind: int, key: str) -> Any:
        if scalar := SCALARS.get(kind):
            return self._scalar(scalar)
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array(key)
        raise self._error(f"is corrupt: {key} has the unknown value type {kind}")

    def _array(self, key: str) -> list[Any]:
        kind, count = self._scalar(U32), self._scalar(U64)
        if scalar := SCALARS.get(kind):
            self._check_count(f"length of {key}", count, scalar.size)
            start = self._take(count * scalar.size)
            return list(struct.unpack_from(f"<{count}{scalar.format[1:]}", self._data, start))
        if kind == STRING:
            self._check_count(f"length of {key}", count, 8)
            return [self._string() for _ in range(count)]
        raise self._error(f"{key} is an array of type {kind}; arrays of numbers and of strings are read")

    def _tensor(self) -> TensorEntry:
        name = self._string()
        num_dimensions = self._scalar(U32)
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise self._error(
                f"is corrupt: tensor {name!r} has {num_dimensions} dimensions, 1 to {MAX_DIMENSIONS} exist"
            )
        shape = tuple(self._scalar(U64) for _ in range(num_dimensions))
        return TensorEntry(name, shape, self._scalar(U32), self._scalar(U64))
