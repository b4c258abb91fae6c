"""The GGUF header reader: what it reads, and that no broken file gets past it."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import pytest

from tests.workers.gguf_files import KEYS, random_tensors, write_gguf
from workers.errors import ModelFileError
from workers.weights.gguf_header import read_header


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def header(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def refusal(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert str(caught.value).startswith(path.name)
    return str(caught.value)


def test_agrees_with_the_package_gguf(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", random_tensors(), general__name="tiny")
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    assert ours.metadata["general.name"] == "tiny"
    assert ours.metadata["llama.embedding_length"] == KEYS["llama.embedding_length"]
    assert ours.metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert {t.name: (t.size, ours.data_start + t.offset) for t in ours.tensors.values()} == {
        t.name: (tuple(t.shape.tolist()[::-1]), t.data_offset) for t in theirs.tensors
    }


def test_reads_arrays(tmp_path: Path) -> None:
    numbers = struct.pack("<IIQ3i", 9, 5, 3, -1, 0, 7)
    strings = struct.pack("<IIQ", 9, 8, 2) + string("a") + string("é")
    path = tmp_path / "arrays.gguf"
    path.write_bytes(header(keys=2) + string("numbers") + numbers + string("strings") + strings)
    assert read_header(path).metadata == {"numbers": [-1, 0, 7], "strings": ["a", "é"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"GG", "truncated: magic number needs bytes 0 to 4, the file has 2"),
        (header(magic=b"GGML"), "not a GGUF file: it begins with b'GGML'"),
        (header(version=1), "GGUF version must be one of (2, 3), is 1"),
        (header(version=3 << 24), "big-endian GGUF is not supported"),
        (header(tensors=2**60), "1152921504606846976 tensors do not fit into the 24 bytes"),
        (header(keys=1) + bytes(4), "1 metadata keys do not fit into the 28 bytes"),
        (header(keys=1) + struct.pack("<Q", 99) + bytes(9), "truncated: metadata key 0 needs bytes 32 to 131"),
        (header(keys=1) + string("k") + struct.pack("<I", 77) + bytes(8), "k has the unknown metadata type 77"),
        (header(keys=1) + struct.pack("<Q", 1) + b"\xff" + bytes(9), "metadata key 0 at byte 32 is not UTF-8"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", 9, 4, 10), "10 items of k do not fit"),
        (header(keys=1) + string("k") + struct.pack("<IIQ", 9, 9, 1) * 9, "k"),
        (header(keys=2) + (string("k") + struct.pack("<IQ", 10, 1)) * 2, "metadata key 'k' appears twice"),
        (header(keys=1) + string("general.alignment") + struct.pack("<II", 4, 3), "must be a power of two, is 3"),
        (header(tensors=1) + string("t") + struct.pack("<IQIQ", 0, 1, 0, 0), "must have 1 to 4 dimensions, has 0"),
        (header(tensors=1) + string("t") + struct.pack("<IQIQ", 1, 0, 0, 0), "tensor 't' has the impossible size [0]"),
        (header(tensors=1) + string("t") + struct.pack("<IQIQ", 1, 2**50, 0, 0), "impossible size"),
        (header(tensors=1) + string("t") + struct.pack("<IQIQ", 1, 4, 0, 5), "begins at 5, no multiple of"),
        (header(tensors=2) + (string("t") + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2, "tensor 't' appears twice"),
    ],
)
def test_broken_headers_are_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    assert message in refusal(tmp_path / "broken.gguf", content)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path / "absent.gguf")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "whole.gguf", random_tensors())
    content = path.read_bytes()
    end = read_header(path).data_start - 32  # alignment may hide the last bytes
    for size in range(1, end, 7):
        refusal(tmp_path / "cut.gguf", content[:size])


def test_flipped_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "whole.gguf", random_tensors()).read_bytes()
    end = read_header(tmp_path / "whole.gguf").data_start
    generator, path = random.Random(3), tmp_path / "flipped.gguf"
    refused = 0
    for _ in range(500):
        broken = bytearray(content)
        for _ in range(generator.randint(1, 4)):
            broken[generator.randrange(end)] = generator.randrange(256)
        path.write_bytes(broken)
        try:
            read_header(path)
        except ModelFileError:
            refused += 1
    assert refused > 100
