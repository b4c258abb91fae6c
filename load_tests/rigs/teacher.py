"""Our model, teacher-forced: the logits at every position of given tokens, computed the way an engine does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.attention.cache import KvCache
from workers.forward import Forward, LoadedModel
from workers.plan import Chunk
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId

BLOCK_SIZE = 16


def new_cache(model: LoadedModel, num_tokens: int) -> KvCache:
    shape = model.shape
    return KvCache(
        num_layers=shape.num_layers,
        num_blocks=-(-num_tokens // BLOCK_SIZE),
        num_kv_heads=shape.num_kv_heads,
        block_size=BLOCK_SIZE,
        head_dim=shape.head_dim,
        dtype=model.cache_dtype,
    )


def teacher_forced(
    model: LoadedModel, tokens: list[int], chunk_tokens: int, over: Callable[[KvCache], Forward] | None = None
) -> torch.Tensor:
    """Return logits [len(tokens), vocab]; `chunk_tokens` of 1 is how an answer is decoded. `over`: see
    `LoadedModel`, unless the model is put to work in another way."""
    forward = (over or model.over)(new_cache(model, len(tokens)))
    sequence = Sequence(GenerateWork(work_id=WorkId("oracle", 0), prompt=tokens, max_tokens=1))
    # Blocks in descending order: a table that is not the identity.
    sequence.block_table = list(range(-(-len(tokens) // BLOCK_SIZE)))[::-1]
    logits = []
    for start in range(0, len(tokens), chunk_tokens):
        size = min(chunk_tokens, len(tokens) - start)
        chunk = Chunk(sequence, start, size, samples=False)
        logits.append(forward.compute([chunk], all_rows=True).values.clone())
    return torch.cat(logits)
