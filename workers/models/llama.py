"""The Llama family: Llama 2 and 3, Mistral, SmolLM2, TinyLlama, Qwen2, Qwen3. Differences are numbers of `ModelShape`.

Owns the weights, packed once at load. Knows rows of tokens and positions; not sequences, blocks or sampling.

    x = embedding                                   fp32 from here on, whatever the type of the weights
    x += output(attend(rotate(qkv(norm(x)))))       per layer
    x += down(silu(gate(norm(x))) * up(norm(x)))
    logits = head(norm(x))                          of the rows that sample; fp32

The residual stream and everything elementwise are fp32; matrix products and the cache have `dtype`; the head is fp32.
Where kernels are "fp16", all this is fp32, and embedding, projections and head have their weights rounded to fp16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import rms_norm, silu

from workers import kernels
from workers.attention.backend import AttentionBackend, StepAttention
from workers.attention.cache import KvCache
from workers.attention.cpu import CpuAttention
from workers.attention.layout import StepLayout
from workers.kv_memory import KvMemory
from workers.linear import Adapter, Linear
from workers.models.torch_forward import TorchForward
from workers.rotary import inverse_frequencies
from workers.weights.checkpoint import Checkpoint
from workers.weights.shape import ModelShape

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: torch.Tensor
    qkv: Linear
    head_norm: torch.Tensor | None
    """[heads + kv_heads, head_dim]: the weight of q_norm for each query head, then of k_norm for each key head."""
    output: Linear
    ffn_norm: torch.Tensor
    gate_up: Linear
    down: Linear


class LlamaModel:
    """Raises ModelFileError if `checkpoint` lacks a tensor, one is of another size than the shape says, or rotary
    embedding has no finite angles."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self.shape: ModelShape = checkpoint.shape
        self.dtype = kernels.activations(dtype)
        self.cache_dtype = f"u{self.dtype.itemsize}"
        self.dtype_name = DTYPE_NAMES[dtype]
        self.kernels = kernels.kernel_for(dtype)
        shape = self.shape
        embedding = checkpoint.tensor("model.embed_tokens.weight", shape.vocab_size, shape.hidden_size)
        self._layers = [_load_layer(checkpoint, i, dtype) for i in range(shape.num_layers)]
        self._norm = checkpoint.tensor("model.norm.weight", shape.hidden_size)
        head = (
            embedding
            if shape.tied_embeddings
            else checkpoint.tensor("lm_head.weight", shape.vocab_size, shape.hidden_size)
        )
        has_fp16_weights = self.kernels == "fp16"
        self._head = Linear(head, None, dtype if has_fp16_weights else torch.float32)
        is_narrow = has_fp16_weights and kernels.fits_fp16(embedding)
        self._embedding = embedding.to(torch.float16 if is_narrow else self.dtype)
        self._eps = torch.full((1, 1), shape.norm_eps)
        self._frequencies = torch.from_numpy(inverse_frequencies(shape.rope, shape.head_dim))
        self.adapters: set[str] = set()
        """Names that a sequence may have."""

    def attach(self, name: str, changes: Mapping[tuple[int, str], Adapter]) -> None:
        """Add an adapter: what it adds to projections, each named by layer and "qkv", "output", "gate_up" or "down"."""
        for (layer, projection), change in changes.items():
            linear = getattr(self._layers[layer], projection)
            assert isinstance(linear, Linear)
            linear.adapters[name] = change
        self.adapters.add(name)

    def new_cache(self, *, num_blocks: int, block_size: int) -> KvCache:
        """Return a cache for this model."""
        return KvCache(
            num_layers=self.shape.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=self.shape.num_kv_heads,
            block_size=block_size,
            head_dim=self.shape.head_dim,
            dtype=self.dtype,
        )

    def over(self, cache: KvMemory, attention: AttentionBackend | None = None) -> TorchForward:
        """Return the model at work over `cache`, attending by `attention` or the CPU's own."""
        assert isinstance(cache, KvCache)
        assert cache.dtype is self.dtype
        return TorchForward(self, cache, attention or CpuAttention())

    @torch.inference_mode()
    def forward(self, layout: StepLayout, attention: StepAttention) -> torch.Tensor:
        """Compute the rows of a step; return the logits [len(layout.sampling_rows), vocab_size] in fp32."""
        shape, adapters = self.shape, layout.adapter_rows
        queries_and_keys = (shape.num_heads, shape.num_kv_heads)
        rotated_and_values = (sum(queries_and_keys), shape.num_kv_heads)
        heads_of_all = (len(layout.tokens), sum(rotated_and_values), shape.head_dim)
        cos, sin = turns(layout.positions, self._frequencies)
        x = self._embedding[layout.tokens].float()
        for number, layer in enumerate(self._layers):
            qkv = layer.qkv(self._norm_of(x, layer.attention_norm), adapters).view(heads_of_all)
            heads, values = qkv.split_with_sizes(rotated_and_values, 1)
            if self.dtype is not torch.float32:
                heads = heads.float()
            if layer.head_norm is not None:
                heads = rms_norm(heads, (shape.head_dim,), None, shape.norm_eps) * layer.head_norm
            queries, keys = self._narrow(rotate(heads, cos, sin)).split_with_sizes(queries_and_keys, 1)
            x += layer.output(attention.attend(number, queries, keys, values), adapters)
            gate, up = layer.gate_up(self._norm_of(x, layer.ffn_norm), adapters).chunk(2, -1)
            x += layer.down(silu(gate).mul_(up), adapters)
        return self._head(self._norm_of(x[layout.sampling_rows], self._norm).float())

    def _norm_of(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the RMS norm of `x` [rows, hidden], in fewer and faster operators than torch's own is made of."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / self.shape.hidden_size).rsqrt_()
        return self._narrow((x * scale).mul_(weight))

    def _narrow(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.dtype is torch.float32 else x.to(self.dtype)


def turns(positions: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cosines and the sines, each [rows, 1, dim], by which `rotate` turns heads at `positions` [rows]."""
    angles = positions[:, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((-sin, sin), dim=-1)[:, None]


def rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (i, i + dim / 2) of `heads` [rows, heads, dim] by its angle; cos and sin are those of `turns`.

    Formula: Su et al., RoFormer (2021), with the halves of GPT-NeoX:

        x y     left and right half        x y * cos cos
        y x     the same, swapped        + y x * -sin sin
    """
    left, right = heads.chunk(2, -1)
    return (heads * cos).addcmul_(torch.cat((right, left), -1), sin)


def _load_layer(checkpoint: Checkpoint, number: int, dtype: torch.dtype) -> _Layer:
    shape, prefix = checkpoint.shape, f"model.layers.{number}"
    hidden, ffn = shape.hidden_size, shape.ffn_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim

    def fused(names: dict[str, int], inputs: int, has_bias: bool) -> Linear:
        """Stack the projections `names` (with their output sizes) of the same input into one."""
        weight = torch.cat([checkpoint.tensor(f"{prefix}.{name}.weight", size, inputs) for name, size in names.items()])
        if not has_bias:
            return Linear(weight, None, dtype)
        bias = torch.cat([checkpoint.tensor(f"{prefix}.{name}.bias", size) for name, size in names.items()])
        return Linear(weight, bias, dtype)

    head_norm = None
    if shape.qk_norm:
        q_norm = checkpoint.tensor(f"{prefix}.self_attn.q_norm.weight", shape.head_dim)
        k_norm = checkpoint.tensor(f"{prefix}.self_attn.k_norm.weight", shape.head_dim)
        head_norm = torch.cat((q_norm.expand(shape.num_heads, -1), k_norm.expand(shape.num_kv_heads, -1)))
    attention, mlp = "self_attn", "mlp"
    return _Layer(
        attention_norm=checkpoint.tensor(f"{prefix}.input_layernorm.weight", hidden),
        qkv=fused(
            {f"{attention}.q_proj": queries, f"{attention}.k_proj": keys, f"{attention}.v_proj": keys},
            hidden,
            shape.qkv_bias,
        ),
        head_norm=head_norm,
        output=fused({f"{attention}.o_proj": hidden}, queries, shape.output_bias),
        ffn_norm=checkpoint.tensor(f"{prefix}.post_attention_layernorm.weight", hidden),
        gate_up=fused({f"{mlp}.gate_proj": ffn, f"{mlp}.up_proj": ffn}, hidden, shape.ffn_bias),
        down=fused({f"{mlp}.down_proj": hidden}, ffn, shape.ffn_bias),
    )
