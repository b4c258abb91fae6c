"""Finds out, by a few tokens, what a module of transformers asks of attention, and whether ours gives what it wants.

What code does cannot be told from a configuration: a model may mix rows (convolutions, recurrent states), hide a bias
in its mask, or count positions by itself. So two short sequences are computed twice: one by one by transformers alone,
and beside each other over blocks, each in two chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from workers.errors import ModelFileError
from workers.models.interface import LayerCall
from workers.plan import Chunk
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId

LENGTHS = (11, 6)
BLOCK_SIZE = 4
MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}
"""Of the largest logit."""


class PlainStep:
    """Attends within the rows at hand, of one sequence, without blocks."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        mixed = scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return mixed[0].transpose(0, 1)


def probe_tokens(vocab_size: int) -> list[list[int]]:
    """Return the sequences of the probe, of ordinary tokens, the same each time."""
    generator = torch.Generator().manual_seed(1)
    first = min(4, vocab_size - 1)
    return [torch.randint(first, vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.inference_mode()
def plain_logits(module: Any, tokens: list[int]) -> torch.Tensor:
    """Return [tokens, vocab_size] of one pass of transformers alone."""
    logits: torch.Tensor = module(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    return logits.float()


@torch.inference_mode()
def asked_layers(module: Any, calls: Any, tokens: list[int]) -> list[LayerCall]:
    """Return what each layer asks for; `module` attends by `calls` already. Raises ModelFileError if it cannot be
    computed so."""
    layers: list[LayerCall] = []
    calls.on_call = layers.append
    try:
        with calls.during(PlainStep()):
            module(input_ids=torch.tensor([tokens]), use_cache=False)
    except Exception as error:
        raise ModelFileError(
            f"its code does not run over the engine's attention: {type(error).__name__}: {error}"
        ) from error
    finally:
        calls.on_call = lambda call: None
    return layers


def check_equal(model: Any, expected: list[torch.Tensor], tokens: list[list[int]]) -> None:
    """Raises ModelFileError unless `model` gives the `expected` logits of sequences in chunks and side by side."""
    cache = model.new_cache(num_blocks=8, block_size=BLOCK_SIZE)
    forward = model.over(cache)
    sequences = []
    for number, ids in enumerate(tokens):
        sequence = Sequence(GenerateWork(work_id=WorkId("probe", number), prompt=ids, max_tokens=1))
        sequence.block_table = [number, 2 + number, 4 + number]
        sequences.append(sequence)
    cuts = [len(ids) // 2 for ids in tokens]
    parts = [
        [Chunk(sequence, 0, cut, samples=True) for sequence, cut in zip(sequences, cuts, strict=True)],
        [Chunk(s, cut, len(s.tokens) - cut, samples=True) for s, cut in zip(sequences, cuts, strict=True)],
    ]
    for chunks in parts:
        try:
            logits = torch.from_numpy(forward.compute(chunks).values)
        except Exception as error:
            raise ModelFileError(
                f"its code does not run over the engine's blocks: {type(error).__name__}: {error}"
            ) from error
        for row, chunk in enumerate(chunks):
            wanted = expected[sequences.index(chunk.sequence)][chunk.start + chunk.num_tokens - 1]
            error_size = (logits[row] - wanted).abs().max().item()
            limit = MAX_ERROR[model.dtype] * max(1.0, wanted.abs().max().item())
            if not error_size <= limit:
                raise ModelFileError(
                    "its code computes something else over the engine's blocks than by itself (logits differ by "
                    f"{error_size:.3g}): it does more with the rows of a step than attention over earlier tokens"
                )
