"""Engine `transformers`: checkpoints that quantisation libraries wrote, over our blocks, against plain transformers
with the same checkpoint, token for token; and those that are refused, by what they lack."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from load_tests.rigs.reference import gaps, reference_logits
from tests.oracle import gptq_files
from tests.oracle.answers import generate
from workers.config import EngineConfig
from workers.errors import ModelFileError
from workers.fake import fake_manifest
from workers.models import quantised
from workers.models.quantised import check_quantisation
from workers.models.transformers_loading import load_decoder
from workers.paged import assemble, choose_max_model_len
from workers.types import ModelFiles

VOCAB_SIZE, MAX_LEN, NUM_TOKENS, GAP = 97, 128, 8, 1e-4


def bitsandbytes(**options: Any) -> Any:
    return transformers.BitsAndBytesConfig(**options)  # type: ignore[no-untyped-call]


def eight_bits_of_torchao() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return transformers.TorchAoConfig(Int8WeightOnlyConfig())


QUANTISATIONS: dict[str, tuple[str, Any]] = {
    "bitsandbytes-8bit": ("bitsandbytes", lambda: bitsandbytes(load_in_8bit=True, llm_int8_threshold=0.0)),
    "bitsandbytes-4bit": ("bitsandbytes", lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4")),
    "torchao-int8": ("torchao", eight_bits_of_torchao),
    "compressed-tensors-int4": ("compressed-tensors", None),
    "gptq": ("gptq", None),
    "awq": ("awq", None),
}


def save_plain(directory: Path) -> None:
    torch.manual_seed(8)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)


def save_packed(source: Path, directory: Path) -> None:
    """As compressed-tensors packs weights: 4 bits in groups of 32, each rounded to its largest."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    described = {
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "format": "pack-quantized",
        "quantization_status": "frozen",
    }
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    apply_quantization_config(model, QuantizationConfig.model_validate(described))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.detach().view(module.weight.shape[0], -1, 32)
            module.weight_scale.data = groups.abs().amax(-1) / 7
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)


def quantise(name: str, source: Path, directory: Path) -> None:
    """Skips, by name, where the library is not installed."""
    method, make = QUANTISATIONS[name]
    if missing := [package for package in quantised.PACKAGES[method] if find_spec(package) is None]:
        pytest.skip(f"needs {', '.join(missing)}: see docs/engines.md")
    save_plain(source)
    if method in gptq_files.DESCRIBED:
        gptq_files.save_by_groups(method, source, directory)
    elif make is None:
        save_packed(source, directory)
    else:
        transformers.AutoModelForCausalLM.from_pretrained(
            source, quantization_config=make(), dtype=torch.float32, device_map="cpu"
        ).save_pretrained(directory)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 5, 17, 40)]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        last = reference_logits(model, tokens)[-1:]
        assert gaps(last) >= GAP
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTISATIONS)
def test_equal_answers(name: str, tmp_path: Path) -> None:
    """All at once, in chunks of 16, then with a warm cache."""
    directory = tmp_path / "quantised"
    quantise(name, tmp_path / "plain", directory)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    expected = [greedy(plain, prompt) for prompt in prompts()]
    config = EngineConfig(engine="transformers", dtype="fp32", block_size=4, num_blocks=128, chunk_tokens=16)
    manifest = fake_manifest(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN)
    files = ModelFiles(weights=directory, tokenizer_json=directory, chat_template=None, manifest=directory)
    model = load_decoder(config, files, 1, lambda shape: choose_max_model_len(config, manifest, shape))
    engine = assemble(config, model, manifest, hash_key=b"quantised")
    for _ in range(2):
        assert [answer.tokens for answer in generate(engine, prompts(), NUM_TOKENS)] == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": "hqq"}, "quantised by hqq, which is not served; bitsandbytes, torchao"),
    "no-method": ({"bits": 4}, "quantised by no method that is named"),
    "outliers": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "served with llm_int8_threshold 0"),
    "outliers-of-old": ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "served with llm_int8_threshold 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: object())
    described, reason = REFUSED[case]
    with pytest.raises(ModelFileError, match=reason):
        check_quantisation({"quantization_config": described})


@pytest.mark.parametrize("method", quantised.PACKAGES)
def test_a_missing_package_is_named_at_load(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    content = {"model_type": "llama", "quantization_config": {"quant_method": method, "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = EngineConfig(engine="transformers", dtype="fp32")
    files = ModelFiles(weights=tmp_path, tokenizer_json=tmp_path, chat_template=None, manifest=tmp_path)
    packages = " and ".join(quantised.PACKAGES[method])
    with pytest.raises(ModelFileError, match=f"quantised by {method}, which needs the package {packages}") as refusal:
        load_decoder(config, files, 1, lambda shape: None)
    assert ("octavo[quantised]" in str(refusal.value)) is (method in quantised.EXTRA)


def test_plain_checkpoints_pass() -> None:
    check_quantisation({})
