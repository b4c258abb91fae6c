"""What every model of ours is held against: plain `transformers` on the dequantised weights, and what it says."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workers.weights.checkpoint import Checkpoint
from workers.weights.shape import ModelShape

GAP = 2e-3
"""The least difference of the two largest logits at which the largest must be the same."""


def load_reference(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """Return transformers' Llama in `dtype` with the weights of `checkpoint`: no rope scaling, no biases."""
    shape = checkpoint.shape
    assert shape.architecture == "llama"
    assert shape.rope.scaling == "none"
    with torch.device("meta"):
        model = LlamaForCausalLM(_config(shape, dtype)).to(dtype)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensor(name, *parameter.shape))
    # Of meta nothing is left of the frequencies, which transformers keeps in fp32 whatever the model's type is.
    frequencies, _ = model.model.rotary_emb.compute_default_rope_parameters(model.config)
    model.model.rotary_emb.inv_freq = frequencies
    return model.eval()


class RememberedCheckpoint:
    """Reads each tensor of a checkpoint once, for several models of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self.shape = checkpoint.shape
        self._tensors: dict[str, torch.Tensor] = {}

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        if name not in self._tensors:
            self._tensors[name] = self._checkpoint.tensor(name, *size)
        return self._tensors[name]


@torch.inference_mode()
def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """Return the logits [len(tokens), vocab] of one plain forward pass, in fp32."""
    logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


def gaps(logits: torch.Tensor) -> torch.Tensor:
    """Return [rows]: how much the largest logit exceeds the second."""
    first, second = logits.topk(2).values.unbind(-1)
    return first - second


def _config(shape: ModelShape, dtype: torch.dtype) -> LlamaConfig:
    """Attention is spelt out in fp32; in bf16, where that takes minutes without instructions for it, it is the one that
    transformers takes by default."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=shape.tied_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope.theta},
        attn_implementation="eager" if dtype is torch.float32 else "sdpa",
    )
