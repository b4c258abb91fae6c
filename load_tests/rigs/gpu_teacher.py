"""Logits at every position of given tokens, on a GPU: by plain transformers, and by ours in each way that it has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from load_tests.rigs.gpu_engine import DEVICE
from workers.gpu.flash import Spans
from workers.gpu.layout import BlockCache, Rows, StepMemory
from workers.gpu.model import GpuForward, GpuModel
from workers.weights.checkpoint import Checkpoint

WAYS = ("at once", "in chunks of 48", "row by row", "two rows at a time")
BLOCK_SIZE = 16


def reference_model(checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """Return transformers' own on the GPU, for a shape without rope scaling and biases."""
    shape = checkpoint.shape
    assert shape.rope.scaling == "none"
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}
    config_class, model_class = kinds[shape.architecture]
    config = config_class(
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
        attn_implementation="eager",
    )
    with torch.device("meta"):
        model = model_class(config).to(dtype)
    model.to_empty(device=DEVICE)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.tensor(name, *parameter.shape))
    frequencies, _ = model.model.rotary_emb.compute_default_rope_parameters(model.config)
    model.model.rotary_emb.inv_freq = frequencies.to(DEVICE)
    return model.eval()


@torch.inference_mode()
def reference_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return the logits [len(tokens), vocab] of one plain forward pass, in fp32."""
    logits: torch.Tensor = model(torch.tensor([list(tokens)], device=DEVICE), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def teacher_forced(model: GpuModel, tokens: Sequence[int], way: str) -> torch.Tensor:
    """Return the logits [len(tokens), vocab] of `model`, computed in one of `WAYS`."""
    taught = _Taught(model, tokens)
    count = len(tokens)
    if way == "row by row":
        return torch.cat([taught.decode((0,), position) for position in range(count)])
    if way == "two rows at a time":  # the same sequence twice, each in blocks of its own
        pairs = [taught.decode((0, 1), position) for position in range(count)]
        assert all(torch.equal(pair[0], pair[1]) for pair in pairs)
        return torch.cat([pair[:1] for pair in pairs])
    size = count if way == "at once" else 48
    return torch.cat([taught.chunk(start, min(size, count - start)) for start in range(0, count, size)])


class _Taught:
    """Two slots that know all `tokens`, in blocks that are in no order."""

    def __init__(self, model: GpuModel, tokens: Sequence[int]) -> None:
        shape, num_blocks = model.shape, 2 * (-(-len(tokens) // BLOCK_SIZE) + 1)
        self._memory = StepMemory(
            num_slots=2, max_tokens=len(tokens), block_size=BLOCK_SIZE, num_blocks=num_blocks, device=model.device
        )
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).to(model.device)
        used = self._memory.max_blocks
        self._memory.tables[:2] = order[: 2 * used].view(2, used)
        self._memory.tokens[:2, : len(tokens)] = torch.tensor(list(tokens), device=model.device)
        cache = BlockCache(
            num_layers=shape.num_layers,
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=model.dtype,
            device=model.device,
        )
        self._forward = GpuForward(model, self._memory, cache, max_decodes=2)
        self._device = model.device

    def decode(self, slots: tuple[int, ...], position: int) -> torch.Tensor:
        rows = Rows(self._ints(slots), self._ints([position] * len(slots)))
        return self._forward.decode(rows, len(slots)).clone()  # what it returns is there until the next

    def chunk(self, start: int, count: int) -> torch.Tensor:
        rows = Rows(self._ints([0] * count), self._ints(range(start, start + count)))
        end = start + count
        spans = Spans(
            rows=rows,
            tables=self._memory.tables[:1, : -(-end // BLOCK_SIZE)].contiguous(),
            ends=self._ints([0, count]),
            lengths=self._ints([end]),
            max_rows=count,
            max_length=end,
            host=([0, count], [end]),
        )
        return self._forward.compute(rows, count, spans, self._ints(range(count))).clone()

    def _ints(self, values: Sequence[int] | range) -> torch.Tensor:
        return torch.tensor(list(values), dtype=torch.int32, device=self._device)
