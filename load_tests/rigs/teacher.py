"""Our model, teacher-forced: the logits at every position of given tokens, computed the way an engine does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from workers.forward import Forward, LoadedModel
from workers.kv_memory import KvMemory
from workers.plan import Chunk
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId

BLOCK_SIZE = 16


def new_cache(model: LoadedModel, num_tokens: int) -> KvMemory:
    return model.new_cache(num_blocks=-(-num_tokens // BLOCK_SIZE), block_size=BLOCK_SIZE)


def teacher_forced(
    model: LoadedModel, tokens: list[int], chunk_tokens: int, over: Callable[[KvMemory], Forward] | None = None
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
        logits.append(torch.tensor(forward.compute([chunk], all_rows=True).values))
    return torch.cat(logits)
