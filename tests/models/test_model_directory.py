"""Directories as transformers writes them: what is read from them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.models import fetch_model
from tests.models.model_directories import write_directory
from workers.errors import ModelFileError
from workers.types import ModelManifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_directory(tmp_path / "tiny-llama")


def manifest_of(folder: Path, cache_dir: Path) -> ModelManifest:
    return ModelManifest.from_json(fetch_model(str(folder), cache_dir=cache_dir).manifest.read_text())


def edit(path: Path, **changes: object) -> None:
    """Replace keys of a JSON file; None drops one."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({key: item for key, item in value.items() if item is not None}))


def test_a_directory_is_described_and_left_alone(folder: Path, cache_dir: Path):
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    files = fetch_model(str(folder), cache_dir=cache_dir)
    manifest = ModelManifest.from_json(files.manifest.read_text())
    assert files.weights == folder
    assert files.tokenizer_json.parent.parent == cache_dir / "models"
    assert files.tokenizer_json.read_text() == (folder / "tokenizer.json").read_text()
    assert files.chat_template is None
    assert (manifest.name, manifest.architecture, manifest.weights_format) == ("tiny-llama", "llama", "safetensors")
    assert (manifest.vocab_size, manifest.max_model_len) == (64, 128)
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (1, (2,))
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_what_transformers_writes_is_read(tmp_path: Path, cache_dir: Path):
    """Sharded, with grouped heads, saved by transformers itself."""
    transformers = pytest.importorskip("transformers")
    folder = write_directory(tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    manifest = manifest_of(folder, cache_dir)
    assert (manifest.architecture, manifest.max_model_len, manifest.vocab_size) == ("llama", 96, 64)
    missing = sorted(folder.glob("model-*.safetensors"))[0]
    missing.unlink()
    with pytest.raises(ModelFileError, match=f"{missing.name}: is missing; model.safetensors.index.json names it"):
        manifest_of(folder, cache_dir)


def test_every_end_of_an_answer_is_found(folder: Path, cache_dir: Path):
    edit(folder / "generation_config.json", eos_token_id=[5, 2])
    edit(folder / "config.json", eos_token_id=4)
    edit(folder / "tokenizer_config.json", eos_token={"content": "<e>"}, bos_token="<b>")
    edit_tokens(folder, {"<e>": 7, "<b>": 8})
    manifest = manifest_of(folder, cache_dir)
    assert manifest.eos_token_ids == (7, 5, 2, 4), "the tokenizer's own first"
    assert manifest.bos_token_id == 8


def edit_tokens(folder: Path, tokens: dict[str, int]) -> None:
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    vocabulary = {text: number for text, number in value["model"]["vocab"].items() if number not in tokens.values()}
    value["model"]["vocab"] = {**vocabulary, **tokens}
    path.write_text(json.dumps(value))


def test_a_sliding_window_bounds_the_length(folder: Path, cache_dir: Path):
    """Within its window a Mistral computes what it would without one; more than that is not served yet."""
    edit(folder / "config.json", architectures=["MistralForCausalLM"], sliding_window=96)
    assert manifest_of(folder, cache_dir).max_model_len == 96


def test_the_chat_template_is_found_where_it_may_be(folder: Path, cache_dir: Path):
    def template() -> str:
        path = fetch_model(str(folder), cache_dir=cache_dir).chat_template
        assert path is not None
        return path.read_text()

    edit(folder / "tokenizer_config.json", chat_template=[{"name": "default", "template": "named"}])
    assert template() == "named"
    edit(folder / "tokenizer_config.json", chat_template="plain")
    assert template() == "plain"
    (folder / "chat_template.jinja").write_text("a file of its own")
    assert template() == "a file of its own"


def test_each_edit_makes_another_description(folder: Path, cache_dir: Path):
    first = fetch_model(str(folder), cache_dir=cache_dir)
    edit(folder / "config.json", max_position_embeddings=256)
    second = fetch_model(str(folder), cache_dir=cache_dir)
    assert first.manifest != second.manifest
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# A model\n")
    assert manifest_of(folder, cache_dir).licence == "mit"
    assert first.manifest.exists()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "config.json",
            {"architectures": ["BloomForCausalLM"]},
            "architecture 'BloomForCausalLM' is not supported; supported: Llama",
        ),
        ("config.json", {"hidden_size": None}, "KeyError: 'hidden_size'"),
        ("config.json", {"num_hidden_layers": -3}, "num_layers must be >= 1, is -3"),
        ("config.json", {"vocab_size": 10}, r"must be below vocab_size \(10\), the largest is 63"),
        ("tokenizer.json", {"model": "nonsense"}, "is not a tokenizer"),
    ],
)
def test_a_broken_value_is_named(folder: Path, cache_dir: Path, name: str, changes, message: str):
    edit(folder / name, **changes)
    with pytest.raises(ModelFileError, match=message) as caught:
        manifest_of(folder, cache_dir)
    assert str(caught.value).startswith(str(folder))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", None, r"config\.json: is missing"),
        ("config.json", "{", r"config\.json: is not JSON"),
        pytest.param("config.json", "[" * 200_000, r"config\.json: is not JSON", id="config.json-deep"),
        ("config.json", "[]", r"config\.json: must be a JSON object, is a list"),
        ("tokenizer.json", None, r"tokenizer\.json: is missing: a model needs its tokenizer$"),
        (
            "model.safetensors",
            None,
            r"tiny-llama: must have model\.safetensors or .* or pytorch_model\.bin\.index\.json$",
        ),
        ("model.safetensors", "cut", r"model\.safetensors: is truncated or corrupt: the header's length is 0"),
        ("model.safetensors", "\x04" + "\0" * 7 + "null", r"is corrupt: the header is not that of a safetensors file"),
        (
            "model.safetensors",
            "\x26" + "\0" * 7 + '{"a": {"data_offsets": [0, Infinity]}}',
            r"is corrupt: the header is not that of a safetensors file",
        ),
        pytest.param(
            "model.safetensors",
            "\0\0\1" + "\0" * 5 + "[" * 65_536,
            r"is corrupt: the header is not that of a safetensors file",
            id="model.safetensors-deep",
        ),
        ("model.safetensors.index.json", "{}", "weight_map must name the file of each tensor, is None"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "must lie in the same directory, is '../b'"),
    ],
)
def test_a_broken_file_is_named(folder: Path, cache_dir: Path, name: str, text: str | None, message: str):
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(ModelFileError, match=message):
        manifest_of(folder, cache_dir)


def test_truncated_weights_are_refused_with_both_sizes(folder: Path, cache_dir: Path):
    path = folder / "model.safetensors"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match=f"its header says {size} bytes, the file has {size - 10}"):
        manifest_of(folder, cache_dir)


def test_other_forms_of_tokenizer_and_weights_are_named(folder: Path, cache_dir: Path):
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ModelFileError, match=r"found tokenizer\.model; AutoTokenizer"):
        manifest_of(folder, cache_dir)
    (folder / "model.safetensors").rename(folder / "consolidated.pth")
    with pytest.raises(ModelFileError, match=r"found consolidated\.pth, which is not read from a directory"):
        manifest_of(folder, cache_dir)


def test_pickled_weights_are_read_where_there_are_no_safetensors(folder: Path, cache_dir: Path):
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    assert manifest_of(folder, cache_dir).weights_format == "safetensors"
    (folder / "model.safetensors").unlink()
    assert manifest_of(folder, cache_dir).weights_format == "pickles"


def test_any_architecture_is_described_for_engines_with_code_of_others(folder: Path, cache_dir: Path):
    edit(folder / "config.json", architectures=["GPTNeoXForCausalLM"], quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelFileError, match="GPTNeoXForCausalLM"):
        fetch_model(str(folder), cache_dir=cache_dir)
    edit(folder / "sentence_bert_config.json", max_seq_length=24)
    files = fetch_model(str(folder), cache_dir=cache_dir, any_architecture=True)
    manifest = ModelManifest.from_json(files.manifest.read_text())
    assert (manifest.architecture, manifest.vocab_size, manifest.max_model_len) == ("GPTNeoXForCausalLM", 64, 24)
