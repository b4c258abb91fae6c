"""Engine `transformers`: random models of many families over our blocks, against plain transformers in fp32, token for
token; and those that it refuses, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from load_tests.rigs.reference import gaps, reference_logits
from tests.oracle import loaded
from tests.oracle.answers import Committed, committed_answers, generate
from tests.oracle.cases import NewEngine, num_prompts, run_case
from tests.oracle.covering import covering
from workers.build import read_manifest
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.errors import ConfigError, ModelFileError
from workers.fake import fake_manifest
from workers.models.transformers_loading import load_decoder
from workers.models.transformers_model import TransformersModel
from workers.paged import assemble, choose_max_model_len
from workers.types import ModelFiles

VOCAB_SIZE = 97
NUM_TOKENS = 8
BLOCK_SIZE = 4
GAP = 1e-4
MAX_LEN = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": MAX_LEN,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT = {"vocab_size": VOCAB_SIZE, "n_positions": MAX_LEN, "n_embd": 48, "n_layer": 2, "n_head": 6}
ENDLESS = {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Qwen3": GROUPED | {"head_dim": 16},
    "GPTNeoX": SIZES,
    "Phi": SIZES | {"num_key_value_heads": 6},
    "Gemma": GROUPED | {"head_dim": 20},
    "GPT2": GPT | ENDLESS,
    "OPT": {**SIZES, "ffn_dim": 80, "word_embed_proj_dim": 48, "init_std": 0.3, "pad_token_id": 1},
    "Olmo2": GROUPED,
    "Cohere": GROUPED,
    "Granite": GROUPED | {"attention_multiplier": 0.3, "logits_scaling": 2.0},
    "Mixtral": GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "StableLm": GROUPED,
    "Starcoder2": GROUPED | {"sliding_window": None},
    "Bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "n_layer": 2, "n_head": 6, **ENDLESS},
    "Mpt": {"vocab_size": VOCAB_SIZE, "d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": MAX_LEN, **ENDLESS},
}
CLASSES = {"GPT2": "GPT2LMHeadModel"}
"""Those that are not called as all others."""
THOROUGH = ("Llama", "Bloom")
"""Of these, every pair of conditions."""


def save_random(family: str, directory: Path, **changes: Any) -> Any:
    """Save a random model of a family, norms and biases random too, and return transformers' own, in plain code."""
    torch.manual_seed(8)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family] | changes)
    model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory)
    return model


def files_in(directory: Path) -> ModelFiles:
    return ModelFiles(
        weights=directory, tokenizer_json=directory, chat_template=None, manifest=directory / "manifest.json"
    )


def load(directory: Path, **options: Any) -> TransformersModel:
    config = EngineConfig(engine="transformers", dtype=options.pop("dtype", "fp32"), **options)
    manifest = fake_manifest(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN)
    model = load_decoder(config, files_in(directory), 1, lambda shape: choose_max_model_len(config, manifest, shape))
    assert isinstance(model, TransformersModel)
    return model


def engines(model: TransformersModel) -> NewEngine:
    manifest = fake_manifest(vocab_size=VOCAB_SIZE, max_model_len=MAX_LEN)

    def make(**options: int) -> PagedEngine:
        config = EngineConfig(engine="transformers", block_size=BLOCK_SIZE, **options)  # type: ignore[arg-type]
        return assemble(config, model, manifest, hash_key=b"random")

    return make


def prompts() -> list[list[int]]:
    """4 prompts of 1 to 40 tokens, two of which share their first 20."""
    generator = torch.Generator().manual_seed(11)
    drawn = [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in (1, 5, 17, 40)]
    return [*drawn[:2], drawn[3][:20] + drawn[2], drawn[3]]


def greedy(model: Any, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """Return transformers' greedy answer, whose gaps are ten times larger than what the order of sums changes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        last = reference_logits(model, tokens)[-1:]
        assert gaps(last) >= GAP
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_answers(family: str, tmp_path: Path) -> None:
    """In chunks of 16 and whole, all at once, then with a warm cache."""
    plain = save_random(family, tmp_path)
    expected = [greedy(plain, prompt) for prompt in prompts()]
    new_engine = engines(load(tmp_path))
    for chunk_tokens in (16, 256):
        engine = new_engine(chunk_tokens=chunk_tokens, num_blocks=128, max_num_sequences=5)
        for is_warm in (False, True):
            answers = generate(engine, prompts(), NUM_TOKENS)
            assert [answer.tokens for answer in answers] == expected
            assert not is_warm or sum(answer.num_cached_tokens for answer in answers) > 40
        engine.check_integrity()


@pytest.mark.parametrize("family", THOROUGH)
def test_under_all_conditions(family: str, tmp_path: Path) -> None:
    """Chunked, cached, preempted, resumed, with lookup, several choices of a prompt."""
    plain = save_random(family, tmp_path)
    new_engine = engines(load(tmp_path))
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(6, (19,), generator=generator).tolist()
    entries = []
    for number in range(16):
        own = torch.randint(6, (1 + 2 * number,), generator=generator).tolist()
        prompt = shared + own if number % 3 == 0 else own
        entries.append(Committed(str(number), prompt, greedy(plain, prompt, 4), GAP))
    num_preemptions = 0
    for number, case in enumerate(covering()):
        first = number * 5 % 16
        chosen = (entries + entries)[first : first + num_prompts(case)]
        load_report = run_case(case, chosen, 4, new_engine, block_size=BLOCK_SIZE, seed=number)
        num_preemptions += load_report.num_preemptions
    assert num_preemptions > 0


@pytest.mark.exact
def test_real_model_from_a_directory(default_model: ModelFiles, tmp_path: Path) -> None:
    """SmolLM2, saved by transformers: the answers of the oracle."""
    loaded.reference(default_model.weights, torch.float32).save_pretrained(tmp_path)
    manifest = read_manifest(default_model.manifest)
    config = EngineConfig(engine="transformers", dtype="fp32", num_blocks=256, max_model_len=512, max_num_sequences=4)
    model = load_decoder(config, files_in(tmp_path), 2, lambda shape: choose_max_model_len(config, manifest, shape))
    engine = assemble(config, model, manifest, hash_key=b"real")
    entries = sorted(committed_answers(), key=lambda entry: len(entry.prompt))[:4]
    answers = generate(engine, [entry.prompt for entry in entries], NUM_TOKENS)
    assert [answer.tokens for answer in answers] == [entry.answer[:NUM_TOKENS] for entry in entries]


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "own-attention-code": (
        "Falcon",
        {**SIZES, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
        {},
        "does not attend through transformers' attention interface",
    ),
    "recurrent": (
        "Mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 48, "num_hidden_layers": 2, "state_size": 4},
        {},
        "layers of type linear_attention",
    ),
    "softcap": ("Gemma2", GROUPED | {"head_dim": 16, "sliding_window": 256}, {}, "softcap"),
    "window": ("Mistral", GROUPED | {"sliding_window": 16}, {}, "sliding window of 16"),
    "rotary-by-length": (
        "Llama",
        GROUPED | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        {"max_model_len": 4 * MAX_LEN},
        "depends on the longest sequence",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_reason(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, sizes, options, reason = REFUSED[case]
    monkeypatch.setitem(FAMILIES, family, sizes)
    save_random(family, tmp_path)
    with pytest.raises(ModelFileError, match=reason):
        load(tmp_path, **options)


def test_window_is_served_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "Mistral", GROUPED | {"sliding_window": 64})
    plain = save_random("Mistral", tmp_path)
    model = load(tmp_path, max_model_len=64)
    config = EngineConfig(engine="transformers", block_size=BLOCK_SIZE, num_blocks=64, max_model_len=64)
    engine = assemble(config, model, fake_manifest(vocab_size=VOCAB_SIZE, max_model_len=64), hash_key=b"window")
    expected = [greedy(plain, prompt) for prompt in prompts()]
    assert [answer.tokens for answer in generate(engine, prompts(), NUM_TOKENS)] == expected


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"dtype": "int8"}, "engine.dtype must be"),
        ({"kernels": "native"}, "engine.kernels must be"),
        ({"device": "cuda"}, "engine.device must be one of auto, cpu"),
        ({"weights": "int8"}, "engine.weights must be one of auto"),
    ],
)
def test_what_it_is_not_set_up_for(options: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rule):
        load(tmp_path, **options)


def test_alibi_in_bf16_is_refused(tmp_path: Path) -> None:
    save_random("Bloom", tmp_path)
    with pytest.raises(ConfigError, match="fp32 for ALiBi"):
        load(tmp_path, dtype="bf16")


def test_a_module_that_mixes_rows_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that looks at the row before it, as convolutions do, attends through the interface all the same."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    save_random("Llama", tmp_path)
    plain: Callable[..., torch.Tensor] = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) + x.roll(1, 1))
    with pytest.raises(ModelFileError, match="computes something else"):
        load(tmp_path)
