"""Model files that nobody wrote: whatever is in them, a ModelFileError comes out or a model, and no memory for claims.

Flipped and cut bytes of GGUF files and pickles are in the tests of these; here it is values: what a header says of
types, sizes, offsets and numbers, and JSON of any other form. Each is loaded for torch and packed for the C library.
"""

from __future__ import annotations

import contextlib
import json
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from router.model import ServedModel
from router.tokenizer import Tokenizer
from tests.router.rig import byte_tokenizer, served_model
from tests.workers.gguf_files import KEYS, random_tensors
from tests.workers.random_models import write_random_model
from workers.errors import ModelFileError
from workers.models.llama import LlamaModel
from workers.types import ModelFiles
from workers.weights.checkpoint import open_checkpoint
from workers.weights.directory import PICKLES, SAFETENSORS, read_json, weight_files
from workers.weights.gguf_header import read_header
from workers.weights.packed import UnpackableError
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import PackingMode

MIB = 1 << 20
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

edges = st.sampled_from([0, 1, 2, 3, 31, 32, 64, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**48, 2**60, 2**63, 2**64 - 1])
leaves = st.one_of(
    st.none(),
    st.booleans(),
    edges,
    st.integers(-5, 5),
    st.floats(),
    st.sampled_from([10**400, -(10**400)]),
    st.text(max_size=8),
)
anything = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner))
"""JSON of any form."""


@contextmanager
def little_memory(limit: int = 24 * MIB) -> Iterator[None]:
    """Nothing here takes more than `limit` bytes, by the books of Python and numpy; torch keeps none."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def open_or_refuse(path: Path) -> bool:
    """Load all of a model, for either kind of kernels; return whether both went well."""
    is_packed = is_loaded = False
    with contextlib.suppress(ModelFileError, UnpackableError):
        load_packed(path, "", PackingMode.INT8, None)
        is_packed = True
    with contextlib.suppress(ModelFileError):
        LlamaModel(open_checkpoint(path), torch.float32)
        is_loaded = True
    return is_packed and is_loaded


def changed(tree: Any, path: list[int], value: object) -> Any:
    """Return `tree` with what is at `path` (which child, again and again) replaced by `value`."""
    if not path or not isinstance(tree, dict | list) or not tree:
        return value
    if isinstance(tree, list):
        at = path[0] % len(tree)
        return [*tree[:at], changed(tree[at], path[1:], value), *tree[at + 1 :]]
    key = list(tree)[path[0] % len(tree)]
    return {**tree, key: changed(tree[key], path[1:], value)}


places = st.lists(st.integers(0, 300), min_size=1, max_size=4)


# GGUF.

Keys = dict[str, tuple[int, bytes]]
"""Type and value, as the file has them."""
Tensors = list[tuple[str, tuple[int, ...], int, int]]
"""Name, sizes with the innermost first, type, offset."""


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf_file(keys: Keys, tensors: Tensors, data: bytes, *, num_keys: int = -1, num_tensors: int = -1) -> bytes:
    """Return a file; the counts may be other than the truth."""
    counts = (num_tensors if num_tensors >= 0 else len(tensors), num_keys if num_keys >= 0 else len(keys))
    header = b"GGUF" + struct.pack("<IQQ", 3, *counts)
    for name, (kind, value) in keys.items():
        header += text(name) + struct.pack("<I", kind) + value
    for name, sizes, kind, offset in tensors:
        header += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)
    return header + bytes(-len(header) % 32) + data


def whole_file() -> tuple[Keys, Tensors, bytes]:
    """Return a model of one layer, in parts."""
    keys: Keys = {"general.architecture": (8, text("llama"))}
    for name, value in KEYS.items():
        keys[name] = (6, struct.pack("<f", value)) if isinstance(value, float) else (4, struct.pack("<I", value))
    tensors, data = Tensors(), b""
    for name, array in random_tensors().items():
        tensors.append((name, array.shape[::-1], 0, len(data)))
        data += array.astype(np.float32).tobytes()
    return keys, tensors, data


scalars = st.one_of(
    st.tuples(st.just(10), edges.map(lambda value: struct.pack("<Q", value))),
    st.tuples(st.just(11), st.integers(-(2**63), 2**63 - 1).map(lambda value: struct.pack("<q", value))),
    st.tuples(st.just(6), st.floats(width=32).map(lambda value: struct.pack("<f", value))),
    st.tuples(st.just(7), st.sampled_from([b"\0", b"\1", b"\7"])),
    st.tuples(st.just(8), st.text(max_size=8).map(text)),
    st.tuples(st.just(9), edges.map(lambda count: struct.pack("<IQ", 4, count))),
    st.tuples(st.just(9), st.integers(0, 20).map(lambda depth: struct.pack("<IQ", 9, 1) * depth + bytes(12))),
    st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=8)),
)
names = st.sampled_from(
    [
        *KEYS,
        "general.architecture",
        "general.alignment",
        "llama.rope.freq_base",
        "llama.rope.scaling.type",
        "llama.rope.dimension_count",
        "llama.attention.key_length",
        "llama.attention.sliding_window",
        "llama.expert_count",
    ]
)


@quick
@given(changes=st.dictionaries(names, scalars, min_size=1, max_size=3))
def test_gguf_keys_of_any_value(tmp_path: Path, changes: Keys) -> None:
    keys, tensors, data = whole_file()
    (path := tmp_path / "a.gguf").write_bytes(gguf_file(keys | changes, tensors, data))
    with little_memory():
        open_or_refuse(path)


@quick
@given(
    at=st.integers(0, 10),
    sizes=st.lists(edges, max_size=5).map(tuple),
    kind=st.integers(0, 45) | edges.filter(lambda value: value < 2**32),
    offset=edges,
    part=st.sampled_from(["sizes", "kind", "offset", "all"]),
)
def test_gguf_tensors_of_any_place(
    tmp_path: Path, at: int, sizes: tuple[int, ...], kind: int, offset: int, part: str
) -> None:
    keys, tensors, data = whole_file()
    name, old_sizes, old_kind, old_offset = tensors[at]
    tensors[at] = (
        name,
        sizes if part in ("sizes", "all") else old_sizes,
        kind if part in ("kind", "all") else old_kind,
        offset if part in ("offset", "all") else old_offset,
    )
    (path := tmp_path / "a.gguf").write_bytes(gguf_file(keys, tensors, data))
    with little_memory():
        open_or_refuse(path)


def test_the_written_file_is_whole(tmp_path: Path) -> None:
    (path := tmp_path / "a.gguf").write_bytes(gguf_file(*whole_file()))
    assert open_or_refuse(path)


@pytest.mark.parametrize("count", [2**31, 2**40, 2**60, 2**64 - 1])
@pytest.mark.parametrize("what", ["num_tensors", "num_keys", "string", "array", "nested"])
def test_no_memory_for_what_a_gguf_header_claims(tmp_path: Path, what: str, count: int) -> None:
    keys, tensors, data = whole_file()
    counts: dict[str, Any] = {}
    match what:
        case "string":
            keys["general.name"] = (8, struct.pack("<Q", count))
        case "array":
            keys["general.name"] = (9, struct.pack("<IQ", 0, count))
        case "nested":
            keys["general.name"] = (9, struct.pack("<IQIQ", 9, 1, 8, count))
        case _:
            counts[what] = count
    (path := tmp_path / "a.gguf").write_bytes(gguf_file(keys, tensors, data, **counts))
    with little_memory(4 * MIB), pytest.raises(ModelFileError):
        read_header(path)


# Safetensors and config.json.


DTYPES = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F4", "F6_E2M3", "I16", "U16", "F16", "BF16", "I32")
DTYPES += ("U32", "F32", "C64", "F64", "I64", "U64", "Q4", "")


@dataclass(frozen=True, slots=True)
class Directory:
    """A model's directory, in parts."""

    config: dict[str, Any]
    header: dict[str, Any]
    data: bytes

    def write(self, folder: Path, *, num_header_bytes: int | None = None) -> Path:
        """Write it; the number of the header's bytes may be other than the truth."""
        header = json.dumps(self.header).encode()
        size = len(header) if num_header_bytes is None else num_header_bytes
        (folder / "model.safetensors").write_bytes(size.to_bytes(8, "little") + header + self.data)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Directory:
    """A model of two layers."""
    folder = write_random_model(tmp_path_factory.mktemp("whole"), "llama")
    weights = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    config = json.loads((folder / "config.json").read_text())
    return Directory(config, json.loads(weights[8:start]), weights[start:])


def test_the_written_directory_is_whole(tmp_path: Path, whole: Directory) -> None:
    assert open_or_refuse(whole.write(tmp_path))


@quick
@given(
    at=st.integers(0, 20),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "other"]),
    dtype=st.sampled_from(DTYPES),
    numbers=st.lists(edges, max_size=4),
    other=anything,
)
def test_safetensors_headers_of_any_value(
    tmp_path: Path, whole: Directory, at: int, field: str, dtype: str, numbers: list[int], other: object
) -> None:
    name = list(whole.header)[at % len(whole.header)]
    entry: Any = other
    if field != "other":
        entry = whole.header[name] | {field: dtype if field == "dtype" else numbers}
    with little_memory():
        open_or_refuse(replace(whole, header=whole.header | {name: entry}).write(tmp_path))


@pytest.mark.parametrize("size", [0, 1, 7, 2**20, 2**31, 2**60, 2**64 - 1])
def test_no_memory_for_what_a_safetensors_header_claims(tmp_path: Path, whole: Directory, size: int) -> None:
    with little_memory(4 * MIB):
        assert not open_or_refuse(whole.write(tmp_path, num_header_bytes=size))


@quick
@given(changes=st.lists(st.tuples(places, anything), max_size=3))
def test_configurations_of_any_value(tmp_path: Path, whole: Directory, changes: list[tuple[list[int], Any]]) -> None:
    config: Any = whole.config | {"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": None}
    for path, value in changes:
        config = changed(config, path, value)
    with little_memory():
        open_or_refuse(replace(whole, config=config).write(tmp_path))


@pytest.mark.parametrize(
    ("name", "value"), [("rope_theta", 1e-300), ("original_max_position_embeddings", 10**400), ("factor", 1e-300)]
)
def test_angles_of_no_model(tmp_path: Path, whole: Directory, name: str, value: float) -> None:
    """They made NaN of every logit, or an OverflowError of the start."""
    rope = whole.config["rope_parameters"] | {name: value}
    path = replace(whole, config=whole.config | {"rope_parameters": rope}).write(tmp_path)
    with pytest.raises(ModelFileError):
        LlamaModel(open_checkpoint(path), torch.float32)


DEEP = pytest.param("[" * 200_000, id="deep")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        DEEP,
        pytest.param('{"a":' * 200_000, id="deep-named"),
        "NaN",
        pytest.param("1" * 5_000, id="long"),
    ],
)
def test_json_that_no_parser_takes(tmp_path: Path, content: str) -> None:
    """Brackets in brackets were a RecursionError."""
    (path := tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelFileError):
        read_json(path)


@quick
@given(index=anything, form=st.sampled_from([SAFETENSORS, PICKLES]))
def test_indices_of_any_value(tmp_path: Path, index: object, form: Any) -> None:
    for content in (index, {"weight_map": index}, {"weight_map": {"a": index}}):
        (tmp_path / form.index).write_text(json.dumps(content))
        with contextlib.suppress(ModelFileError):
            weight_files(tmp_path, form)
    (tmp_path / form.index).unlink()


# What a router opens.

TOKENIZER = json.loads(byte_tokenizer().to_str())


@quick
@given(path=places, value=anything)
def test_tokenizers_of_any_form(tmp_path: Path, path: list[int], value: object) -> None:
    (file := tmp_path / "tokenizer.json").write_text(json.dumps(changed(TOKENIZER, path, value)))
    with contextlib.suppress(ModelFileError):
        Tokenizer.from_file(file)


@quick
@given(path=places, value=anything)
def test_manifests_of_any_form(tmp_path: Path, path: list[int], value: object) -> None:
    tree = changed(json.loads(served_model().manifest.to_json()), path, value)
    (manifest := tmp_path / "manifest.json").write_text(json.dumps(tree))
    (tokenizer := tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (template := tmp_path / "template.jinja").write_text("{{ bos_token }}")
    files = ModelFiles(weights=tmp_path, tokenizer_json=tokenizer, chat_template=template, manifest=manifest)
    with contextlib.suppress(ModelFileError):
        ServedModel.from_files(files)


@pytest.mark.parametrize("content", [DEEP, "[]", "{}", "7"])
def test_manifests_that_are_none(tmp_path: Path, content: str) -> None:
    (manifest := tmp_path / "manifest.json").write_text(content)
    files = ModelFiles(weights=tmp_path, tokenizer_json=tmp_path, chat_template=None, manifest=manifest)
    with pytest.raises(ModelFileError, match="is not a manifest"):
        ServedModel.from_files(files)
