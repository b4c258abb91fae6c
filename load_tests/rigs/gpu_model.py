"""A model of random weights in a directory, as a cluster opens it: for measuring through all of it on a GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from workers.weights.shape import ModelShape, from_config


def write_model(folder: Path, config: Mapping[str, Any], *, std: float = 0.02) -> None:
    """Write config.json, model.safetensors and a tokenizer that has a word for each id."""
    shape = from_config(config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(where).manual_seed(0)

    def made(name: str, size: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=torch.bfloat16)
        empty = torch.empty(size, dtype=torch.bfloat16, device=where)
        return empty.normal_(0.0, std, generator=generator).cpu()

    save_file({name: made(name, size) for name, size in sizes(shape).items()}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json.dumps(_tokenizer(shape.vocab_size)))


def sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a model without biases, and their sizes."""
    hidden, head_dim = shape.hidden_size, shape.head_dim
    queries, keys = shape.num_heads * head_dim, shape.num_kv_heads * head_dim
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied_embeddings:
        found["lm_head.weight"] = (shape.vocab_size, hidden)
    for number in range(shape.num_layers):
        layer = f"model.layers.{number}"
        found |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.mlp.gate_proj.weight": (shape.ffn_size, hidden),
            f"{layer}.mlp.up_proj.weight": (shape.ffn_size, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, shape.ffn_size),
        }
        if shape.qk_norm:
            found |= {f"{layer}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
    return found


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    words = {f"w{number}": number for number in range(vocab_size)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "w0"},
    }
