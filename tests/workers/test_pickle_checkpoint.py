"""Directories of pytorch_model.bin as checkpoints: files old and new, shards, and what is refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from workers.errors import ModelFileError
from workers.weights.checkpoint import open_checkpoint
from workers.weights.pickle_checkpoint import PickleCheckpoint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


@pytest.mark.parametrize("is_new", [True, False])
def test_a_single_file(folder: Path, *, is_new: bool) -> None:
    """Zip archives, and the plain pickles that torch wrote before 1.6."""
    values = torch.tensor([1.5, -2.0, 0.25])
    tensors = {"a": values, "b": values.half(), "c": values.bfloat16()}
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shape.vocab_size == 50
    for name in tensors:
        assert checkpoint.tensor(name, 3).dtype is torch.float32
        assert torch.equal(checkpoint.tensor(name, 3), values)


def test_shards(folder: Path) -> None:
    weight_map = {}
    for number, name in enumerate("ab"):
        file = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({name: torch.full((2,), float(number))}, folder / file)
        weight_map[name] = file
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(folder)
    assert [checkpoint.tensor(name, 2).tolist() for name in "ab"] == [[0.0, 0.0], [1.0, 1.0]]
    (folder / weight_map["b"]).unlink()
    with pytest.raises(ModelFileError, match=r"00002-of-00002\.bin: is missing"):
        open_checkpoint(folder)


def test_safetensors_go_first(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert not isinstance(open_checkpoint(folder), PickleCheckpoint)


class Executed:
    """A pickle of this would run a command when it is loaded."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._path}",)


@pytest.mark.parametrize("is_new", [True, False])
def test_nothing_is_executed(folder: Path, *, is_new: bool) -> None:
    witness = folder / "executed"
    content = {"a": torch.zeros(1), "b": Executed(witness)}
    torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=is_new)
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin: holds more than tensors, or is corrupt"):
        open_checkpoint(folder)
    assert not witness.exists()


@pytest.mark.parametrize("size", [0, 4, 60, 1200])
def test_cut_files(folder: Path, size: int) -> None:
    path = folder / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ModelFileError, match=r"^pytorch_model\.bin: .*corrupt"):
        open_checkpoint(folder)


@pytest.mark.parametrize("is_new", [True, False])
def test_flipped_bytes(folder: Path, *, is_new: bool) -> None:
    """Whatever the loader makes of them, it is a broken model file or tensors."""
    path, generator = folder / "pytorch_model.bin", random.Random(1)
    torch.save({"a": torch.zeros(64), "b": torch.ones(3).half()}, path, _use_new_zipfile_serialization=is_new)
    whole, num_refused = path.read_bytes(), 0
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(generator.choice((1, 2, 4))):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        path.write_bytes(broken)
        try:
            open_checkpoint(folder)
        except ModelFileError:
            num_refused += 1
    assert 0 < num_refused < 300


def test_parameters(folder: Path) -> None:
    """Packing needs arrays, which a tensor that wants a gradient refuses to become."""
    torch.save({"a": torch.nn.Parameter(torch.tensor([1.5, -2.0]))}, folder / "pytorch_model.bin")
    assert open_checkpoint(folder).tensor("a", 2).numpy().tolist() == [1.5, -2.0]


def test_broken_tensors(folder: Path) -> None:
    tensors = {"nan": torch.tensor([1.0, float("nan")]), "int": torch.tensor([1]), "text": "no tensor"}
    torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = open_checkpoint(folder)
    for name, size, message in (
        ("nan", 2, "pytorch_model.bin: tensor nan: has numbers that are not finite"),
        ("nan", 3, r"size must be \[3\], is \[2\]"),
        ("int", 1, "torch.int64, which needs a quantised kernel"),
        ("text", 1, "tensor text is missing"),
    ):
        with pytest.raises(ModelFileError, match=message):
            checkpoint.tensor(name, size)


def test_what_is_no_dictionary(folder: Path) -> None:
    torch.save([torch.zeros(1)], folder / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match="must hold tensors by name, holds a list"):
        open_checkpoint(folder)
