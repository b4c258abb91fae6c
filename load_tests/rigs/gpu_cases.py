"""What two engines are asked on one GPU, and the floor of each: models, cases and arithmetic. Standard library alone.

Weights are random and prompts are random token ids, so that nothing but speed can be measured. A case calls
``generate(prompts, num_tokens)``, which answers all prompts at once, each with exactly so many tokens, and returns the
seconds that took.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

COPY_GB_S = 4284.0
"""What an H200 reads and writes in a large copy, measured."""
MATMUL_TFLOPS = 799.0
"""Its rate in a large bf16 product of random numbers, measured."""

Generate = Callable[[Sequence[Sequence[int]], int], float]

_COMMON = {
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "attention_bias": False,
    "use_cache": True,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "intermediate_size": 1536,
        "vocab_size": 49152,
        "rope_theta": 100000.0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "qwen3-0.6b": _COMMON
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "vocab_size": 151936,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "llama-3.1-8b": _COMMON
    | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
}
MAX_MODEL_LEN = 8192
SHORT, LONG = 8, 264
"""A decode step is the difference of two runs that are so many tokens long."""
DECODE_PROMPT = 32


@dataclass(frozen=True, slots=True)
class Size:
    """What a model's arithmetic depends on."""

    weight_bytes: float
    """Read in each step: all but the rows of the embedding that are not looked up."""
    kv_bytes: float
    """Of one token."""
    linear_params: float

    @classmethod
    def of(cls, config: dict[str, Any]) -> Size:
        hidden, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        linear = layers * (2 * hidden * head * (heads + kv_heads) + 3 * hidden * config["intermediate_size"])
        with_head = linear + hidden * config["vocab_size"]
        norms = hidden * (2 * layers + 1) + (2 * head * layers if config["model_type"] == "qwen3" else 0)
        return cls(2.0 * (with_head + norms), 4.0 * layers * kv_heads * head, float(linear))

    def decode_floor_ms(self, batch: int, context: float) -> float:
        """Return the time to read weights and context once, or to multiply, whichever is longer."""
        num_bytes = self.weight_bytes + self.kv_bytes * context * batch
        return max(num_bytes / COPY_GB_S / 1e6, self.weight_bytes * batch / MATMUL_TFLOPS / 1e9)

    def prefill_floor_ms(self, num_tokens: int) -> float:
        """Return the time of the linear layers' arithmetic; attention would come on top of it."""
        return max(2.0 * self.linear_params * num_tokens / MATMUL_TFLOPS / 1e9, self.decode_floor_ms(1, 0.0))


@dataclass(frozen=True, slots=True)
class Case:
    """`limit` and `stretch` are ratios to vLLM by model; `is_rate`: more is better."""

    name: str
    unit: str
    is_rate: bool
    measure: Callable[[Generate, Callable[[int], list[int]]], float]
    floor: Callable[[Size], float]
    limits: dict[str, tuple[float, float | None]]


def _decode(batch: int) -> Callable[[Generate, Callable[[int], list[int]]], float]:
    def measure(generate: Generate, prompt: Callable[[int], list[int]]) -> float:
        short = generate([prompt(DECODE_PROMPT) for _ in range(batch)], SHORT)
        long = generate([prompt(DECODE_PROMPT) for _ in range(batch)], LONG)
        return (long - short) / (LONG - SHORT) * 1e3

    return measure


def _throughput(generate: Generate, prompt: Callable[[int], list[int]]) -> float:
    return 256 * 256 / generate([prompt(512) for _ in range(256)], 256)


def _shared_prefix(generate: Generate, prompt: Callable[[int], list[int]]) -> float:
    beginning = prompt(1024)
    return 256 / generate([beginning + prompt(64) for _ in range(256)], 128)


def _first_token(generate: Generate, prompt: Callable[[int], list[int]]) -> float:
    return statistics.median(generate([prompt(4096)], 1) for _ in range(5)) * 1e3


def _decode_floor(batch: int) -> Callable[[Size], float]:
    return lambda size: size.decode_floor_ms(batch, DECODE_PROMPT + (SHORT + LONG) / 2)


def _throughput_floor(size: Size) -> float:
    seconds = size.prefill_floor_ms(256 * 512) + 256 * size.decode_floor_ms(256, 512 + 128)
    return 256 * 256 / seconds * 1e3


def _shared_floor(size: Size) -> float:
    seconds = size.prefill_floor_ms(1024 + 256 * 64) + 128 * size.decode_floor_ms(256, 1088 + 64)
    return 256 / seconds * 1e3


def _limits(
    llama: tuple[float, float | None], qwen: tuple[float, float | None], smol: tuple[float, float | None]
) -> Any:
    return {"llama-3.1-8b": llama, "qwen3-0.6b": qwen, "smollm2-135m": smol}


CASES = (
    Case("decode 1", "ms", False, _decode(1), _decode_floor(1), _limits((0.97, 0.9), (0.85, 0.6), (0.70, 0.4))),
    Case("decode 64", "ms", False, _decode(64), _decode_floor(64), _limits((0.98, 0.93), (0.78, 0.6), (0.58, None))),
    Case("decode 256", "ms", False, _decode(256), _decode_floor(256), _limits((0.98, 0.93), (0.78, 0.6), (0.45, 0.35))),
    Case(
        "256 x 512+256",
        "tokens/s",
        True,
        _throughput,
        _throughput_floor,
        _limits((1.0, 1.1), (1.3, None), (1.8, None)),
    ),
    Case(
        "256 x 1024 shared+64+128",
        "requests/s",
        True,
        _shared_prefix,
        _shared_floor,
        _limits((1.05, None), (1.3, None), (1.8, None)),
    ),
    Case(
        "first token of 4096",
        "ms",
        False,
        _first_token,
        lambda size: size.prefill_floor_ms(4096),
        _limits((0.95, None), (0.8, None), (0.7, None)),
    ),
)
START_LIMITS = {"llama-3.1-8b": 0.3, "qwen3-0.6b": 0.25, "smollm2-135m": 0.25}


def prompts_of(seed: int, vocab_size: int) -> Callable[[int], list[int]]:
    """Return what makes prompts of a given length; none is like another."""
    rng = random.Random(seed)
    return lambda length: [rng.randrange(10, vocab_size - 10) for _ in range(length)]


def warm_up(generate: Generate, prompt: Callable[[int], list[int]]) -> None:
    """Have everything compiled and allocated that cases need."""
    generate([prompt(64) for _ in range(8)], 16)
    generate([prompt(512) for _ in range(64)], 8)
    generate([prompt(32) for _ in range(256)], 8)
    generate([prompt(4096)], 1)
