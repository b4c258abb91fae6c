"""What is read from GGUF files, and how damaged or unknown ones are refused."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from cluster.models import fetch_model
from workers.errors import ModelFileError
from workers.types import ModelManifest
from workers.weights.gguf_header import read_header


def test_a_file_is_described_beside_and_not_in_its_directory(write_gguf, tmp_path: Path, cache_dir: Path):
    path = write_gguf()
    before = sorted(tmp_path.iterdir())
    files = fetch_model(str(path), cache_dir=cache_dir)
    manifest = ModelManifest.from_json(files.manifest.read_text())
    assert sorted(p for p in tmp_path.iterdir() if p != cache_dir) == before
    assert files.weights == path
    assert files.manifest.parent.parent == cache_dir / "models"
    assert files.chat_template is not None
    assert files.chat_template.read_text() == "{{ messages[0]['content'] }}"
    assert (manifest.name, manifest.architecture, manifest.licence) == ("tiny", "llama", "mit")
    assert (manifest.vocab_size, manifest.max_model_len, manifest.bos_token_id) == (267, 64, 1)
    assert manifest.eos_token_ids == (2, 0), "the file's own end first, then the other tokens that end an answer"


def test_an_unchanged_file_is_found_again_and_an_edited_one_is_not(write_gguf, cache_dir: Path):
    path = write_gguf()
    first = fetch_model(str(path), cache_dir=cache_dir)
    stamp = first.manifest.stat().st_mtime_ns
    assert fetch_model(str(path), cache_dir=cache_dir) == first
    assert first.manifest.stat().st_mtime_ns == stamp
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = fetch_model(str(path), cache_dir=cache_dir)
    assert second.manifest != first.manifest
    manifests = [ModelManifest.from_json(files.manifest.read_text()) for files in (first, second)]
    assert manifests[0].model_fingerprint == manifests[1].model_fingerprint
    assert manifests[0].tokenizer_fingerprint == manifests[1].tokenizer_fingerprint
    assert manifests[0].weights_fingerprint != manifests[1].weights_fingerprint


def test_a_damaged_description_is_made_again(write_gguf, cache_dir: Path):
    path = write_gguf()
    files = fetch_model(str(path), cache_dir=cache_dir)
    text = files.tokenizer_json.read_text()
    files.tokenizer_json.write_text(text[:-20])
    assert fetch_model(str(path), cache_dir=cache_dir) == files
    assert files.tokenizer_json.read_text() == text
    files.manifest.write_text("{}")
    assert fetch_model(str(path), cache_dir=cache_dir) == files
    ModelManifest.from_json(files.manifest.read_text())


def test_a_model_without_chat_template_has_none(write_gguf, cache_dir: Path):
    path = write_gguf(tokenizer__chat_template=None)
    assert fetch_model(str(path), cache_dir=cache_dir).chat_template is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general__architecture": "bloom"},
            "architecture 'bloom' is not supported in GGUF; supported: llama, qwen2, qwen3",
        ),
        ({"llama__context_length": None}, "metadata has no llama.context_length"),
        ({"llama__block_count": 0}, "num_layers must be >= 1, is 0"),
        ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens is missing: the file has no tokenizer"),
        ({"tokenizer__ggml__model": "t5"}, "tokenizer.ggml.model must be gpt2 or llama, is 't5'"),
        ({"tokenizer__ggml__pre": "martian"}, "is 'martian'"),
        ({"tokenizer__ggml__pre": None}, "tokenizer.ggml.pre is missing"),
        ({"tokenizer__ggml__merges": ["h e", "nospace"]}, r"merges\[1\] must be two tokens, is 'nospace'"),
        ({"tokenizer__ggml__token_type": [1, 2]}, r"token_type must be as long as tokens \(267\), is 2"),
        ({"tokenizer__ggml__eos_token_id": 267}, r"eos_token_id must be in \[0, 267\), is 267"),
        ({"tokenizer__ggml__add_bos_token": 3}, "add_bos_token must be a bool, is 3"),
        ({"general__alignment": 24}, "general.alignment must be a power of two, is 24"),
    ],
)
def test_what_cannot_be_served_is_refused_with_file_rule_and_value(write_gguf, cache_dir: Path, changes, message):
    path = write_gguf(**changes)
    with pytest.raises(ModelFileError, match=message) as caught:
        fetch_model(str(path), cache_dir=cache_dir)
    assert f"{path.name}: " in str(caught.value)
    assert caught.value.exit_code == 3
    assert not list((cache_dir / "models").glob("[!.]*/")), "nothing stays in the cache"
    assert not list((cache_dir / "models").glob(".new*"))


def test_other_files_are_refused(tmp_path: Path, write_gguf):
    small, text, old = tmp_path / "small.gguf", tmp_path / "text.gguf", tmp_path / "old.gguf"
    small.write_bytes(b"GGUF")
    text.write_bytes(b"this is not a model at all")
    old.write_bytes(b"GGUF" + struct.pack("<I", 1) + bytes(40))
    for path, message in [
        (small, "small.gguf: truncated: .*, the file has 4"),
        (text, "text.gguf: not a GGUF file: it begins with b'this'"),
        (old, "old.gguf: GGUF version must be one of .2, 3., is 1"),
        (tmp_path, "cannot be read"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            read_header(path)


def test_a_truncated_file_is_refused_wherever_it_is_cut(write_gguf, cache_dir: Path, tmp_path: Path):
    data = write_gguf().read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [30, 200, 1_000, 5_000, len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:size])
        with pytest.raises(ModelFileError, match=r"cut\.gguf: .*truncated"):
            fetch_model(str(cut), cache_dir=cache_dir)


def test_damage_in_the_header_is_refused_or_harmless_but_never_another_error(write_gguf, tmp_path: Path):
    path = write_gguf()
    data, header_bytes = path.read_bytes(), read_header(path).data_start
    damaged, random_ = tmp_path / "damaged.gguf", random.Random(7)
    refusals = []
    for _ in range(300):
        copy = bytearray(data)
        for _ in range(4):
            copy[random_.randrange(header_bytes)] = random_.randrange(256)
        damaged.write_bytes(copy)
        try:
            fetch_model(str(damaged), cache_dir=tmp_path / "fuzz")
        except ModelFileError as error:
            refusals.append(str(error))
    assert len(refusals) > 50
    assert all("damaged.gguf" in text for text in refusals)


def test_the_tokenizer_of_a_file_with_beginning_and_end(write_gguf, cache_dir: Path):
    path = write_gguf(tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True)
    tokenizer = Tokenizer.from_file(str(fetch_model(str(path), cache_dir=cache_dir).tokenizer_json))
    assert tokenizer.encode("hello").tokens == ["<|im_start|>", "hello", "<|im_end|>"]
    assert tokenizer.encode("hello", add_special_tokens=False).tokens == ["hello"]
