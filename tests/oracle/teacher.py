"""Our model, teacher-forced: the logits at every position of given tokens, computed the way an engine does."""

from __future__ import annotations

import dataclasses

import torch

from workers.attention.backend import AttentionBackend
from workers.attention.cache import KvCache
from workers.attention.cpu import CpuAttention
from workers.attention.layout import lay_out
from workers.models.llama import LlamaModel
from workers.plan import Chunk
from workers.runner import CpuRunner
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId

BLOCK_SIZE = 16


def new_cache(model: LlamaModel, num_tokens: int) -> KvCache:
    shape = model.shape
    return KvCache(
        num_layers=shape.num_layers,
        num_blocks=-(-num_tokens // BLOCK_SIZE),
        num_kv_heads=shape.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=shape.head_dim,
        dtype=model.dtype,
    )


def teacher_forced(
    model: LlamaModel, tokens: list[int], chunk_tokens: int, attention: AttentionBackend | None = None
) -> torch.Tensor:
    """Return logits [len(tokens), vocab]; `chunk_tokens` of 1 is how an answer is decoded."""
    runner = CpuRunner(model, new_cache(model, len(tokens)), attention or CpuAttention())
    sequence = Sequence(GenerateWork(work_id=WorkId("oracle", 0), prompt=tokens, max_tokens=1))
    # Blocks in descending order: a table that is not the identity.
    sequence.block_table = list(range(-(-len(tokens) // BLOCK_SIZE)))[::-1]
    logits = []
    with torch.inference_mode():
        for start in range(0, len(tokens), chunk_tokens):
            size = min(chunk_tokens, len(tokens) - start)
            layout = lay_out([Chunk(sequence, start, size, samples=False)], BLOCK_SIZE)
            logits.append(runner.logits(dataclasses.replace(layout, sampling_rows=torch.arange(size))))
    return torch.cat(logits)
