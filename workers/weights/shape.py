"""What a decoder of the Llama family looks like, read from either kind of model file. Numbers only: no tensors.

`from_config` reads a Hugging Face config.json, `from_gguf` the metadata of a GGUF file. Both refuse by name what
`models/llama.py` would compute wrongly: another architecture or activation, experts, partial rotary, unknown scaling.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from workers.errors import ModelFileError

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
GGUF_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""As llama.cpp names them; Mistral is written as "llama"."""


_BROKEN = (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, OverflowError)
"""What reading a value of another kind than it should be raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding. `scaling` is "none", "linear" (every frequency / factor), "llama3" (by wavelength, the four
    numbers below) or "divisors" (frequency i / divisors[i], as GGUF stores llama3's)."""

    theta: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_max_positions: int = 8192
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    max_positions: int
    rope: Rope
    norm_eps: float
    tied_embeddings: bool
    qk_norm: bool
    qkv_bias: bool
    output_bias: bool
    ffn_bias: bool
    sliding_window: int | None = None
    """Tokens that a position sees, if fewer than all. Served only where it changes nothing."""

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_size"),
            "max_positions",
        ):
            value = getattr(self, name)
            if value < 1:
                raise ModelFileError(f"{name} must be >= 1, is {value}")
        if self.num_heads % self.num_kv_heads:
            raise ModelFileError(f"{self.num_heads} heads cannot share {self.num_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise ModelFileError(f"head_dim must be even for rotary embedding, is {self.head_dim}")
        if not 0 < self.norm_eps <= 1:
            raise ModelFileError(f"norm_eps must be positive and at most 1, is {self.norm_eps}")
        self._check_rope()

    def _check_rope(self) -> None:
        rope = self.rope
        if not (rope.theta > 0 and math.isfinite(rope.theta)):
            raise ModelFileError(f"rope theta must be positive, is {rope.theta}")
        if not (rope.factor > 0 and math.isfinite(rope.factor)):
            raise ModelFileError(f"rope factor must be positive, is {rope.factor}")
        if not rope.high_frequency_factor > rope.low_frequency_factor:
            raise ModelFileError(
                f"rope high_freq_factor must be greater than low_freq_factor, is {rope.high_frequency_factor} beside "
                f"{rope.low_frequency_factor}"
            )
        if not 0 < rope.original_max_positions < 2**32:
            raise ModelFileError(
                f"rope original_max_position_embeddings must be in (0, 2^32), is {rope.original_max_positions}"
            )
        if rope.scaling == "divisors" and len(rope.divisors) != self.head_dim // 2:
            raise ModelFileError(f"rope_freqs must have {self.head_dim // 2} numbers, has {len(rope.divisors)}")


def from_config(config: Mapping[str, Any]) -> ModelShape:
    """Read a config.json. Raises ModelFileError for what is missing or not supported, with its value."""
    try:
        return _from_config(config)
    except _BROKEN as error:
        raise ModelFileError(f"config.json: {type(error).__name__}: {error}") from error


def _from_config(config: Mapping[str, Any]) -> ModelShape:
    names = config.get("architectures") or [str(config.get("model_type"))]
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ModelFileError(
            f"architecture {names[0]!r} is not supported; supported: {known}; others by engine transformers or vllm"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelFileError(f"quantised safetensors (quant_method {method!r}) are not supported")
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ModelFileError(f"hidden_act must be 'silu', is {activation!r}")
    hidden_size = int(config["hidden_size"])
    num_heads = int(config["num_attention_heads"])
    attention_bias = bool(config.get("attention_bias", False))
    return ModelShape(
        architecture=architecture,
        vocab_size=int(config["vocab_size"]),
        hidden_size=hidden_size,
        num_layers=int(config["num_hidden_layers"]),
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=int(config.get("head_dim") or hidden_size // num_heads),
        ffn_size=int(config["intermediate_size"]),
        max_positions=int(config["max_position_embeddings"]),
        rope=_rope_from_config(config),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=architecture == "qwen3",
        qkv_bias=architecture == "qwen2" or attention_bias,
        output_bias=architecture != "qwen2" and attention_bias,
        ffn_bias=bool(config.get("mlp_bias", False)),
        sliding_window=_window_from_config(architecture, config),
    )


def _rope_from_config(config: Mapping[str, Any]) -> Rope:
    """Older files have rope_theta and rope_scaling, newer ones rope_parameters with both."""
    parameters = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    theta = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if float(parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) or 1.0) != 1.0:
        raise ModelFileError("partial rotary embedding is not supported")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(parameters["factor"]))
    if kind == "llama3":
        return Rope(
            theta=theta,
            scaling="llama3",
            factor=float(parameters["factor"]),
            low_frequency_factor=float(parameters["low_freq_factor"]),
            high_frequency_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    raise ModelFileError(f"rope scaling {kind!r} is not supported; supported: default, linear, llama3")


def _window_from_config(architecture: str, config: Mapping[str, Any]) -> int | None:
    """Mistral always applies its window; Qwen only with use_sliding_window, from layer max_window_layers on."""
    window = config.get("sliding_window")
    if window is None or (architecture.startswith("qwen") and not config.get("use_sliding_window", False)):
        return None
    return None if architecture == "llama" else int(window)


def from_gguf(metadata: Mapping[str, Any], *, vocab_size: int, tied: bool, divisors: tuple[float, ...]) -> ModelShape:
    """Read GGUF metadata. `vocab_size` is the number of rows of the embedding, `tied` whether there is no output
    tensor, `divisors` the tensor rope_freqs if there is one. Raises ModelFileError."""
    try:
        return _from_gguf(metadata, vocab_size, tied, divisors)
    except _BROKEN as error:
        raise ModelFileError(f"metadata: {type(error).__name__}: {error}") from error


def _from_gguf(metadata: Mapping[str, Any], vocab_size: int, tied: bool, divisors: tuple[float, ...]) -> ModelShape:
    architecture = metadata.get("general.architecture")
    if architecture not in GGUF_ARCHITECTURES:
        raise ModelFileError(
            f"architecture {architecture!r} is not supported in GGUF; supported: {', '.join(GGUF_ARCHITECTURES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{architecture}.{key}", default)
        if value is None:
            raise ModelFileError(f"metadata has no {architecture}.{key}")
        if isinstance(value, list | str):
            raise ModelFileError(f"{architecture}.{key} must be one number, is {str(value)[:60]}")
        return value

    if get("expert_count", 0):
        raise ModelFileError(f"mixture of experts ({get('expert_count')} experts) is not supported")
    hidden_size, num_heads = int(get("embedding_length")), int(get("attention.head_count"))
    if num_heads < 1:
        raise ModelFileError(f"{architecture}.attention.head_count must be >= 1, is {num_heads}")
    head_dim = int(get("attention.key_length", hidden_size // num_heads))
    if (rotary := int(get("rope.dimension_count", head_dim))) != head_dim:
        raise ModelFileError(f"partial rotary embedding ({rotary} of {head_dim} dimensions) is not supported")
    if (values := int(get("attention.value_length", head_dim))) != head_dim:
        raise ModelFileError(f"values of {values} dimensions beside keys of {head_dim} are not supported")
    return ModelShape(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=int(get("block_count")),
        num_heads=num_heads,
        num_kv_heads=int(get("attention.head_count_kv", num_heads)),
        head_dim=head_dim,
        ffn_size=int(get("feed_forward_length")),
        max_positions=int(get("context_length")),
        rope=_rope_from_gguf(metadata, architecture, float(get("rope.freq_base", 10000.0)), divisors),
        norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        tied_embeddings=tied,
        qk_norm=architecture == "qwen3",
        qkv_bias=architecture == "qwen2",
        output_bias=False,
        ffn_bias=False,
        sliding_window=int(get("attention.sliding_window", 0)) or None,
    )


def _rope_from_gguf(metadata: Mapping[str, Any], architecture: str, theta: float, divisors: tuple[float, ...]) -> Rope:
    kind = metadata.get(f"{architecture}.rope.scaling.type", "none")
    if divisors:
        return Rope(theta=theta, scaling="divisors", divisors=divisors)
    if kind == "none":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, scaling="linear", factor=float(metadata[f"{architecture}.rope.scaling.factor"]))
    raise ModelFileError(f"rope scaling {kind!r} is not supported in GGUF; supported: none, linear, rope_freqs")
