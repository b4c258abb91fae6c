"""Small random models as directories of safetensors, one for each way in which the Llama family differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 96, 83, 4, 2, 16, 2
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "llama-biases": {"architectures": ["LlamaForCausalLM"], "attention_bias": True, "mlp_bias": True},
    "mistral-tied": {"architectures": ["MistralForCausalLM"], "tie_word_embeddings": True},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"]},
    "qwen3-tied": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
_CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def write_random_model(directory: Path, variant: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a model of 2 layers; `changes` are keys of its config.json."""
    config = _CONFIG | VARIANTS[variant] | changes
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    sizes = _sizes(config)
    tensors = {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


def _sizes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    name = config["architectures"][0]
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    queries, keys = (
        config["num_attention_heads"] * config["head_dim"],
        config["num_key_value_heads"] * config["head_dim"],
    )
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    sizes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        sizes["lm_head.weight"] = (config["vocab_size"], hidden)
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        linears = {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        has_bias = {
            "self_attn.q_proj": name.startswith("Qwen2") or config.get("attention_bias"),
            "self_attn.o_proj": config.get("attention_bias"),
            "mlp.gate_proj": config.get("mlp_bias"),
        }
        has_bias["self_attn.k_proj"] = has_bias["self_attn.v_proj"] = has_bias["self_attn.q_proj"]
        has_bias["mlp.up_proj"] = has_bias["mlp.down_proj"] = has_bias["mlp.gate_proj"]
        for linear, size in linears.items():
            sizes[f"{layer}.{linear}.weight"] = size
            if has_bias[linear]:
                sizes[f"{layer}.{linear}.bias"] = size[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            sizes[f"{layer}.{norm}.weight"] = (hidden,)
        if name.startswith("Qwen3"):
            sizes |= {f"{layer}.self_attn.{norm}.weight": (config["head_dim"],) for norm in ("q_norm", "k_norm")}
    return sizes
