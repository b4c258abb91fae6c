"""Each architecture as a random model of 2 layers, saved by transformers, against it, token for token in fp32, by both
kinds of kernels."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from load_tests.rigs.reference import gaps, reference_logits
from tests.oracle.answers import Committed, generate
from tests.oracle.cases import NewEngine, num_prompts, run_case, seeded_choices
from tests.oracle.covering import Case, product
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.fake import fake_manifest
from workers.forward import LoadedModel
from workers.models.llama import LlamaModel
from workers.native import library
from workers.native.model import NativeDtype, NativeModel
from workers.paged import assemble
from workers.types import SamplingParams
from workers.weights.checkpoint import open_checkpoint
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import PackingMode

VOCAB_SIZE = 97
NUM_TOKENS = 12
NUM_PRODUCT_TOKENS = 4
BLOCK_SIZE = 4
GAP = 1e-4
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied-mha": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"num_key_value_heads": 6}, tie_word_embeddings=True)
    ),
    "llama-mqa-biases": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES | {"num_key_value_heads": 1}, attention_bias=True, mlp_bias=True)
    ),
    "llama3-rope": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=LLAMA3)),
    "llama-linear-rope": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0})
    ),
    "mistral-wide-heads": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None, head_dim=16)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}
ARCHITECTURES = ("llama3-rope", "mistral-wide-heads", "qwen2", "qwen3-tied")


def save_random(name: str, directory: Path, **options: Any) -> PreTrainedModel:
    """Save a random model; norms and biases, which transformers initialises to 1 and 0, are random too."""
    torch.manual_seed(8)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(directory, **options)
    return model


def random_prompts() -> list[list[int]]:
    """5 prompts of 1 to 70 tokens, two of which share their first 40."""
    generator = torch.Generator().manual_seed(11)
    lengths = (1, 5, 17, 30)
    prompts = [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in (*lengths, 70)]
    prompts[3] = prompts[4][:40] + prompts[3]
    return prompts


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int = NUM_TOKENS) -> list[int]:
    """Return transformers' greedy answer, whose gaps are ten times larger than what the order of sums changes."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        last = reference_logits(model, tokens)[-1:]
        assert gaps(last) >= GAP
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> str:
    return needed(request.param)


def needed(kernels: str) -> str:
    if kernels == "native" and library.library() is None:
        pytest.skip("native kernels: the C library was not built")
    return kernels


def engines(directory: Path, kernels: str) -> NewEngine:
    """Return what makes engines with an empty cache over the model in `directory`."""
    model: LoadedModel
    if kernels == "native":
        packed = load_packed(directory, "", PackingMode.EXACT, None)
        model = NativeModel(packed, NativeDtype.FP32, threads=2)
    else:
        model = LlamaModel(open_checkpoint(directory), torch.float32)
    manifest = fake_manifest(vocab_size=VOCAB_SIZE, max_model_len=128)

    def make(**options: int) -> PagedEngine:
        config = EngineConfig(block_size=BLOCK_SIZE, **options)  # type: ignore[arg-type]
        return assemble(config, model, manifest, hash_key=b"random")

    return make


def assert_equal_answers(model: PreTrainedModel, directory: Path, kernels: str) -> None:
    """In chunks of 16 and whole, each prompt alone and all 5 at once, with a cold and a warm cache."""
    prompts = random_prompts()
    expected = [greedy(model, prompt) for prompt in prompts]
    new_engine = engines(directory, kernels)
    for chunk_tokens in (16, 256):
        engine = new_engine(chunk_tokens=chunk_tokens, num_blocks=128, max_num_sequences=5)
        together = generate(engine, prompts, NUM_TOKENS)
        alone = [generate(engine, [prompt], NUM_TOKENS)[0] for prompt in prompts]
        for answers in (together, alone):
            for answer, tokens in zip(answers, expected, strict=True):
                assert answer.tokens == tokens
        assert sum(answer.num_cached_tokens for answer in alone) > 0


@pytest.mark.parametrize("name", MODELS)
def test_equal_answers(name: str, kernels: str, tmp_path: Path) -> None:
    model = save_random(name, tmp_path)
    assert_equal_answers(model, tmp_path, kernels)


def test_shards(kernels: str, tmp_path: Path) -> None:
    model = save_random("llama", tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_equal_answers(model, tmp_path, kernels)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_condition(name: str, tmp_path: Path) -> None:
    assert_conditions(name, tmp_path, full_product(), needed("native"))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_conditions_with_torch(name: str, tmp_path: Path) -> None:
    """Every other case of the full product on one of the architectures: they take turns."""
    assert_conditions(name, tmp_path, full_product()[ARCHITECTURES.index(name) :: 2 * len(ARCHITECTURES)], "torch")


@pytest.mark.exact
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_condition_with_torch(name: str, tmp_path: Path) -> None:
    assert_conditions(name, tmp_path, full_product(), "torch")


def full_product() -> list[Case]:
    """Return the product of all conditions but lookup, which is on in a random half, in a random order."""
    cases, numbers = product(), random.Random(0)
    chosen = [numbers.choice(pair) for pair in zip(cases[::2], cases[1::2], strict=True)]
    return numbers.sample(chosen, len(chosen))


def assert_conditions(name: str, directory: Path, cases: list[Case], kernels: str) -> None:
    """Prompts are of 6 different tokens, so that there is something to look up."""
    model = save_random(name, directory)
    new_engine = engines(directory, kernels)
    generator = torch.Generator().manual_seed(5)
    shared = torch.randint(6, (19,), generator=generator).tolist()
    entries = []
    for number in range(16):
        own = torch.randint(6, (1 + 2 * number,), generator=generator).tolist()
        prompt = shared + own if number % 3 == 0 else own
        entries.append(Committed(str(number), prompt, greedy(model, prompt, NUM_PRODUCT_TOKENS), GAP))
    num_preemptions = num_drafted = 0
    for number, case in enumerate(cases):
        first, size = number * 5 % 16, num_prompts(case)
        chosen = (entries + entries)[first : first + size]
        load = run_case(case, chosen, NUM_PRODUCT_TOKENS, new_engine, block_size=BLOCK_SIZE, seed=number)
        num_preemptions += load.num_preemptions
        num_drafted += load.num_drafted_tokens
        assert case.is_starved or not load.num_preemptions
    assert num_preemptions > 0
    assert num_drafted > 0


@pytest.mark.parametrize("name", MODELS)
def test_seeded_choices_are_those_of_single_works(name: str, kernels: str, tmp_path: Path) -> None:
    save_random(name, tmp_path)
    seeded_choices(engines(tmp_path, kernels), random_prompts()[3], NUM_TOKENS, SamplingParams(seed=7, temperature=0.9))


def test_pickled_weights(kernels: str, tmp_path: Path) -> None:
    """As older models come, in shards; the tied head is in none of them."""
    model = save_random("qwen3-tied", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    weight_map = {name: f"pytorch_model-{number % 2}.bin" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if weight_map[name] == file}, tmp_path / file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal_answers(model, tmp_path, kernels)
