"""Packed models: what they hold under every rule, and the file in which a node's replicas share them."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from tests.workers.gguf_files import FFN, HIDDEN, random_tensors, write_gguf
from tests.workers.packed_assertions import assert_equal, assert_holds, assert_same, matrices
from tests.workers.random_models import VARIANTS, write_random_model
from workers.errors import ModelFileError
from workers.native.packing import Format, pack_bf16, quantise_q4, quantise_q8, unpack
from workers.types import ModelFiles
from workers.weights import packed_file
from workers.weights.checkpoint import open_checkpoint
from workers.weights.packed import PackedModel, UnpackableError
from workers.weights.packed_cache import load_packed
from workers.weights.packed_file import PackedKey, UnusableFileError, read_packed
from workers.weights.packed_mode import PackingMode, packing_mode

Kind = gguf.GGMLQuantizationType
EXACT, BF16, INT8, INT4 = PackingMode.EXACT, PackingMode.BF16, PackingMode.INT8, PackingMode.INT4
FINGERPRINT = "0123abcd"
KEY = PackedKey(FINGERPRINT, EXACT)


def pack(weights: Path, mode: PackingMode = EXACT) -> PackedModel:
    return load_packed(weights, FINGERPRINT, mode, None)


def formats(model: PackedModel) -> set[Format]:
    return {matrix.format for matrix in matrices(model)[2:]}


def write_quantised(path: Path, kind: Kind, *, embedding: Kind = Kind.Q8_0, seed: int = 0) -> Path:
    """Write a Llama of 1 layer whose matrices are of type `kind`."""
    tensors = random_tensors(seed)
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    kinds = {name: embedding if name.startswith("token_embd") else kind for name in matrices}
    raw = {name: (gguf.quants.quantize(tensor, kinds[name]), kinds[name]) for name, tensor in matrices.items()}
    return write_gguf(path, tensors, raw=raw)


# What a packed model holds


@pytest.mark.parametrize(("dtype", "form"), [(torch.float32, Format.F32), (torch.bfloat16, Format.BF16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_exact_is_exact_for_every_architecture(tmp_path: Path, variant: str, dtype: torch.dtype, form: Format) -> None:
    """Weights that are bf16 in the file, or fp32 without a bit more, take half the memory and lose nothing."""
    weights = write_random_model(tmp_path / "model", variant, dtype)
    model = load_packed(weights, FINGERPRINT, EXACT, tmp_path / "packed")
    assert_holds(model, open_checkpoint(weights))
    assert {matrix.format for matrix in matrices(model)} == {form}


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_blocks_are_kept_as_they_are(tmp_path: Path, kind: Kind) -> None:
    """Also in the order of rows that rotary embedding wants, which llama.cpp's file does not have."""
    weights = write_quantised(tmp_path / "a.gguf", kind)
    for mode in (EXACT, BF16, INT8):
        model = load_packed(weights, FINGERPRINT, mode, tmp_path / "packed")
        assert_holds(model, open_checkpoint(weights))
        assert formats(model) == {Format.Q8 if kind is Kind.Q8_0 else Format.Q4}
        assert model.embedding.format is Format.Q8


def test_the_default_model_is_held_exactly(default_model: ModelFiles, tmp_path: Path) -> None:
    model = load_packed(default_model.weights, FINGERPRINT, EXACT, tmp_path)
    assert_holds(model, open_checkpoint(default_model.weights))
    assert formats(model) == {Format.Q4}
    assert model.embedding.format is Format.Q8


def test_other_quantisations_are_undone(tmp_path: Path) -> None:
    weights = write_quantised(tmp_path / "a.gguf", Kind.Q5_0)
    model = pack(weights)
    assert_holds(model, open_checkpoint(weights))
    assert formats(model) == {Format.F32}


def test_parts_of_several_types_are_undone_together(tmp_path: Path) -> None:
    """A matrix of q, k and v has one format, so that of v alone in Q8_0 means fp32 for all three; no number changes."""
    tensors = random_tensors()
    kinds = {"blk.0.attn_q.weight": Kind.Q4_1, "blk.0.attn_k.weight": Kind.Q4_1, "blk.0.attn_v.weight": Kind.Q8_0}
    raw = {name: (gguf.quants.quantize(tensors[name], kind), kind) for name, kind in kinds.items()}
    weights = write_gguf(tmp_path / "a.gguf", tensors, raw=raw)
    model = pack(weights)
    assert_holds(model, open_checkpoint(weights))
    assert model.layers[0].qkv.format is Format.F32


@pytest.mark.parametrize(
    ("mode", "dtype", "expected"),
    [("auto", "fp32", EXACT), ("auto", "int8", INT8), ("exact", "int8", EXACT), ("int4", "fp32", INT4)],
)
def test_auto(mode: str, dtype: str, expected: PackingMode) -> None:
    assert packing_mode(mode, dtype) is expected


def test_rounding(tmp_path: Path) -> None:
    """Each rule rounds as it says, and embedding and head never to four bits."""
    weights = write_random_model(tmp_path, "llama")
    checkpoint = open_checkpoint(weights)
    down = checkpoint.tensor("model.layers.1.mlp.down_proj.weight", HIDDEN, 96).numpy()
    head = checkpoint.tensor("lm_head.weight", 83, HIDDEN).numpy()
    for mode, of_layers, of_head in (
        (BF16, pack_bf16, pack_bf16),
        (INT8, quantise_q8, quantise_q8),
        (INT4, quantise_q4, quantise_q8),
    ):
        model = pack(weights, mode)
        assert_same(unpack(model.layers[1].down), unpack(of_layers(down)))
        assert_same(unpack(model.head), unpack(of_head(head)))
        assert formats(model) == {of_layers(down).format}


def test_four_bits_of_a_quantised_file(tmp_path: Path) -> None:
    assert formats(pack(write_quantised(tmp_path / "8.gguf", Kind.Q8_0), INT4)) == {Format.Q4}
    fine = write_quantised(tmp_path / "4.gguf", Kind.Q4_0, embedding=Kind.Q4_0)
    model = pack(fine, INT4)
    assert_holds(model, open_checkpoint(fine))
    assert model.embedding.format is Format.Q4


def test_rows_of_no_whole_groups_are_not_rounded(tmp_path: Path) -> None:
    weights = write_random_model(tmp_path, "qwen2", hidden_size=80, intermediate_size=80)
    layer = pack(weights, INT8).layers[0]
    down = open_checkpoint(weights).tensor("model.layers.0.mlp.down_proj.weight", 80, 80)
    assert_same(unpack(layer.down), down.numpy())
    assert layer.output.format is Format.Q8


def test_scales_beyond_fp16(tmp_path: Path) -> None:
    """A weight of 1e8 has no scale in fp16, nor has a Q4_0 block with a scale of 60,000 its minimum of -480,000."""
    tensors = random_tensors()
    tensors["blk.0.ffn_down.weight"][0, 0] = 1e8
    weights = write_gguf(tmp_path / "a.gguf", tensors)
    assert pack(weights, INT8).layers[0].down.format is Format.F32
    raw = gguf.quants.quantize(random_tensors()["blk.0.ffn_down.weight"], Kind.Q4_0)
    raw[0, :2] = np.array([60000], dtype=np.float16).view(np.uint8)
    large = write_gguf(tmp_path / "b.gguf", random_tensors(), raw={"blk.0.ffn_down.weight": (raw, Kind.Q4_0)})
    model = pack(large)
    assert_holds(model, open_checkpoint(large))
    assert model.layers[0].down.format is Format.F32


def test_blocks_with_numbers_that_are_not_finite(tmp_path: Path) -> None:
    for kind, at in ((Kind.Q4_0, 0), (Kind.Q4_1, 2), (Kind.Q8_0, 0)):
        raw = gguf.quants.quantize(random_tensors()["blk.0.ffn_down.weight"], kind)
        raw[3, at : at + 2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
        weights = write_gguf(tmp_path / "a.gguf", random_tensors(), raw={"blk.0.ffn_down.weight": (raw, kind)})
        with pytest.raises(ModelFileError, match=r"a.gguf: tensor blk.0.ffn_down.weight: has numbers that are not fin"):
            pack(weights)


def test_quantised_rows_are_looked_for_like_tensors(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_quantised(tmp_path / "a.gguf", Kind.Q4_0))
    with pytest.raises(ModelFileError, match=r"blk.0.ffn_down.weight: size must be \[64, 96\], is \[64, 64\]"):
        checkpoint.quantised("model.layers.0.mlp.down_proj.weight", HIDDEN, 96)
    with pytest.raises(ModelFileError, match=r"blk.1.ffn_down.weight is missing"):
        checkpoint.quantised("model.layers.1.mlp.down_proj.weight", HIDDEN, FFN)


def test_gate_and_up_of_partial_panels_are_refused(tmp_path: Path) -> None:
    weights = write_random_model(tmp_path / "model", "llama", intermediate_size=90)
    for directory in (None, tmp_path / "packed"):
        with pytest.raises(UnpackableError, match="ffn_size must be a multiple of 16 to be packed, is 90"):
            load_packed(weights, FINGERPRINT, EXACT, directory)
    assert sorted(path.name for path in (tmp_path / "packed").iterdir()) == ["exact.lock"]


# The file


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return write_quantised(tmp_path / "model.gguf", Kind.Q4_1)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "packed"


@pytest.mark.parametrize("mode", PackingMode)
@pytest.mark.parametrize("variant", ["llama-biases", "qwen3-tied"])
def test_what_is_mapped_is_what_was_packed(tmp_path: Path, variant: str, mode: PackingMode) -> None:
    weights = write_random_model(tmp_path / "model", variant)
    packed = pack(weights, mode)
    for _ in range(2):
        mapped = load_packed(weights, FINGERPRINT, mode, tmp_path / "packed")
        assert_equal(mapped, packed)
        assert all(matrix.data.ctypes.data % 64 == 0 for matrix in matrices(mapped))
        assert not any(matrix.data.flags.writeable for matrix in matrices(mapped))


def test_the_model_is_not_opened_again(weights: Path, directory: Path) -> None:
    packed = load_packed(weights, FINGERPRINT, EXACT, directory)
    weights.unlink()
    assert_equal(load_packed(weights, FINGERPRINT, EXACT, directory), packed)
    with pytest.raises(ModelFileError, match="no such model file"):
        load_packed(weights, "other weights", EXACT, directory)
    assert sorted(path.name for path in directory.iterdir()) == ["exact.lock", "exact.packed"]


def test_each_rule_has_a_file(weights: Path, directory: Path) -> None:
    for mode in PackingMode:
        load_packed(weights, FINGERPRINT, mode, directory)
    assert sorted(path.stem for path in directory.glob("*.packed")) == sorted(PackingMode)


def test_a_check_comes_before_any_tensor(tmp_path: Path, directory: Path) -> None:
    """Packing may take minutes; what is refused is refused before, from a file as well."""
    tensors = random_tensors()
    tensors["token_embd.weight"][0, 0] = np.nan
    weights = write_gguf(tmp_path / "broken.gguf", tensors)

    def refuse(shape: object) -> None:
        raise LookupError(shape)

    for place in (None, directory):
        with pytest.raises(LookupError):
            load_packed(weights, FINGERPRINT, EXACT, place, check=refuse)
    whole = write_gguf(tmp_path / "whole.gguf", random_tensors())
    load_packed(whole, FINGERPRINT, EXACT, directory)
    with pytest.raises(LookupError):
        load_packed(whole, FINGERPRINT, EXACT, directory, check=refuse)


def cut(size: int) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(path.read_bytes()[:size])

    return apply


def overwritten(at: int, content: bytes) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        whole = bytearray(path.read_bytes())
        start = at % len(whole)
        whole[start : start + len(content)] = content
        path.write_bytes(whole)

    return apply


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut(0), "has only 0 bytes"),
        (cut(63), "has only 63 bytes"),
        (cut(64), "has 64 bytes, was written with"),
        (cut(5000), "has 5000 bytes, was written with"),
        (cut(-1), "bytes, was written with"),
        (overwritten(0, b"GGUF"), "begins with b'GGUFPACK'"),
        (overwritten(8, b"\x02"), "is of version 2, this release reads 1"),
        (overwritten(16, b"\xff" * 8), "bytes, was written with"),
        (overwritten(-5, b"?"), "has a damaged index"),
        (lambda path: path.write_bytes(path.read_bytes() + b"more"), "bytes, was written with"),
        (lambda path: path.write_bytes(bytes(100_000)), "begins with"),
    ],
)
def test_a_damaged_file_is_packed_again(
    weights: Path,
    directory: Path,
    damage: Callable[[Path], None],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    load_packed(weights, FINGERPRINT, EXACT, directory)
    path = directory / "exact.packed"
    damage(path)
    with pytest.raises(UnusableFileError, match=reason):
        read_packed(path, KEY)
    with caplog.at_level(logging.INFO):
        assert_equal(load_packed(weights, FINGERPRINT, EXACT, directory), pack(weights))
    assert reason in caplog.text
    read_packed(path, KEY)


def test_a_file_of_another_layout_or_model_is_packed_again(
    weights: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = write_quantised(weights.with_name("other.gguf"), Kind.Q4_1, seed=3)
    load_packed(other, "of other weights", EXACT, directory)
    assert_equal(load_packed(weights, FINGERPRINT, EXACT, directory), pack(weights))
    with monkeypatch.context() as changed:
        changed.setattr(packed_file, "packing_fingerprint", lambda: "of another release")
        load_packed(other, FINGERPRINT, EXACT, directory)
    assert_equal(load_packed(weights, FINGERPRINT, EXACT, directory), pack(weights))


def rewrite_index(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index and sign it, as no release of ours would."""
    whole = path.read_bytes()
    at = int.from_bytes(whole[16:24], "little")
    index = json.loads(whole[at:])
    raw = json.dumps(change(index) or index).encode()
    digest = packed_file.hashlib.sha256(raw).digest()
    head = packed_file._HEAD.pack(packed_file.MAGIC, packed_file.VERSION, 0, at, len(raw), digest)
    path.write_bytes(head + whole[64:at] + raw)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda index: [1], "that this release did not write"),
        (lambda index: index.pop("shape") and None, "KeyError"),
        (lambda index: index["shape"].update(num_heads=0), "num_heads must be >= 1"),
        (lambda index: index["shape"].update(more=1), "TypeError"),
        (lambda index: index["shape"].update(num_layers=2), "has 'norm' where 'layers.1.attention_norm' must be"),
        (lambda index: index["shape"].update(ffn_size=90), "ffn_size must be a multiple of 16"),
        (lambda index: index["shape"].update(vocab_size=1 << 40), "has 'embedding' at byte 64"),
        (lambda index: index["parts"].pop() and None, "ValueError"),
        (lambda index: index["parts"].reverse(), "where 'embedding' must be"),
        (lambda index: index["parts"][0].update(at=65), "has 'embedding' at byte 65"),
        (lambda index: index["parts"][0].update(at=0), "has 'embedding' at byte 0"),
        (lambda index: index["parts"][0].update(at=-64), "has 'embedding' at byte -64"),
        (lambda index: index["parts"][-1].update(at=1 << 40), "has 'norm' at byte"),
        (lambda index: index["parts"][0].update(at="64"), "TypeError"),
        (lambda index: index["parts"][0].update(at=64.0), "TypeError"),
        (lambda index: index["parts"][0].update(format="Q3"), "KeyError"),
        (lambda index: index["parts"][0].update(format="F32", at=index["parts"][-1]["at"]), "has 'embedding' at byte"),
        (lambda index: index["parts"][0].update(bias_at=64), "has a bias where"),
        (lambda index: index["shape"].update(head_dim=4), "has 'layers.0.output' in Q4 with 16 inputs"),
    ],
)
def test_no_number_of_the_index_is_believed(
    weights: Path, directory: Path, change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    load_packed(weights, FINGERPRINT, EXACT, directory)
    path = directory / "exact.packed"
    rewrite_index(path, change)
    with pytest.raises(UnusableFileError, match=reason):
        read_packed(path, KEY)


def test_flipped_bits_are_noticed_or_harmless(weights: Path, directory: Path) -> None:
    load_packed(weights, FINGERPRINT, EXACT, directory)
    path = directory / "exact.packed"
    whole = path.read_bytes()
    data_end = int.from_bytes(whole[16:24], "little")
    generator = random.Random(1)
    places = [*range(64), *(generator.randrange(data_end, len(whole)) for _ in range(200))]
    for at in places:
        broken = bytearray(whole)
        broken[at] ^= 1 << generator.randrange(8)
        path.write_bytes(broken)
        if 12 <= at < 16:  # nothing is there yet
            read_packed(path, KEY)
        else:
            with pytest.raises(UnusableFileError):
                read_packed(path, KEY)


def test_a_full_disk(weights: Path, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is written goes to /dev/full. The engine starts all the same, says so once, and leaves nothing behind."""
    directory.mkdir(parents=True)
    (directory / "exact.new").symlink_to("/dev/full")
    assert_equal(load_packed(weights, FINGERPRINT, EXACT, directory), pack(weights))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "No space left on device" in warning.getMessage()
    assert [path.name for path in directory.iterdir()] == ["exact.lock"]


def test_a_directory_that_cannot_be_made(weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_equal(load_packed(weights, FINGERPRINT, EXACT, tmp_path / "file" / "packed"), pack(weights))
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "Not a directory" in warning.getMessage()


def test_a_model_that_cannot_be_read_leaves_no_file(tmp_path: Path, directory: Path) -> None:
    tensors = random_tensors()
    tensors["output_norm.weight"][0] = np.nan
    weights = write_gguf(tmp_path / "a.gguf", tensors)
    with pytest.raises(ModelFileError, match="not finite"):
        load_packed(weights, FINGERPRINT, EXACT, directory)
    assert [path.name for path in directory.iterdir()] == ["exact.lock"]


# Several at once

LOAD = """
import logging, sys
from pathlib import Path
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import PackingMode
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
model = load_packed(Path(sys.argv[1]), sys.argv[2], PackingMode.EXACT, Path(sys.argv[3]))
print(len(model.layers), "layers,", sorted({"torch", "gguf", "transformers", "safetensors"} & set(sys.modules)))
"""


def start_load(weights: Path, directory: Path) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-W", "error", "-c", LOAD, str(weights), FINGERPRINT, str(directory)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_two_processes_pack_once_and_a_third_imports_nothing(weights: Path, directory: Path) -> None:
    loads = [start_load(weights, directory) for _ in range(2)]
    outputs = [load.communicate()[0] for load in loads]
    third = start_load(weights, directory)
    assert third.communicate()[0] == "1 layers, []\n"
    assert sum("packed model.gguf (exact)" in output for output in outputs) == 1
    assert [load.returncode for load in (*loads, third)] == [0, 0, 0]


def test_threads_pack_once(weights: Path, directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A lock is held by an open file, not by a process: two engines of one process wait for each other as well."""
    models: list[PackedModel] = []
    barrier = threading.Barrier(4)

    def load() -> None:
        barrier.wait()
        models.append(load_packed(weights, FINGERPRINT, EXACT, directory))

    with caplog.at_level(logging.INFO):
        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert caplog.text.count("packed model.gguf") == 1
    assert len(models) == 4
    for model in models:
        assert_equal(model, models[0])


def test_packing_needs_room_for_one_part(tmp_path: Path, directory: Path) -> None:
    """Of a model that is nearly all embedding and head, never both are held. torch's fp32 tensor is not counted."""
    vocab_size, hidden_size = 20_000, 256
    weights = write_random_model(
        tmp_path / "model", "llama", torch.bfloat16, vocab_size=vocab_size, hidden_size=hidden_size
    )
    tracemalloc.start()
    try:
        load_packed(weights, FINGERPRINT, EXACT, directory)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    part = vocab_size * hidden_size * 2
    assert (directory / "exact.packed").stat().st_size > 2 * part
    assert peak < 4 * part
