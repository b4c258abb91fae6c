"""What packings and roundings cost in perplexity: the native model with each of them, beside fp32 transformers.

Weights come from the model's file, whose blocks stay, or from its dequantised numbers, as if it had 16 or 32 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from load_tests.rigs.perplexity import CHUNK_TOKENS, perplexity
from load_tests.rigs.reference import load_reference, reference_logits
from load_tests.rigs.teacher import teacher_forced
from workers.native.model import NativeDtype, NativeModel
from workers.weights.checkpoint import Checkpoint
from workers.weights.packed import assemble
from workers.weights.packed_mode import PackingMode, packed_parts

WAYS = (
    ("file", PackingMode.EXACT, NativeDtype.BF16),
    ("file", PackingMode.INT8, NativeDtype.INT8),
    ("numbers", PackingMode.BF16, NativeDtype.BF16),
    ("numbers", PackingMode.INT8, NativeDtype.INT8),
    ("numbers", PackingMode.INT4, NativeDtype.INT8),
)
"""Source of the weights, how they are packed, and what becomes of activations, keys and values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingLoss:
    source: str
    packing: str
    dtype: str
    perplexity: float
    increase: float
    """Relative to the reference."""


def packing_losses(
    checkpoints: Mapping[str, Checkpoint], windows: Sequence[list[int]], threads: int
) -> Iterator[PackingLoss]:
    """Yield what each of `WAYS` makes of `windows` of token ids. The reference knows plain Llama shapes only."""
    reference = load_reference(checkpoints["numbers"])
    expected = perplexity(windows, partial(reference_logits, reference))
    for source, mode, dtype in WAYS:
        checkpoint = checkpoints[source]
        model = NativeModel(assemble(checkpoint.shape, dict(packed_parts(checkpoint, mode))), dtype, threads=threads)
        found = perplexity(windows, partial(teacher_forced, model, chunk_tokens=CHUNK_TOKENS))
        yield PackingLoss(
            source=source,
            packing=mode.value,
            dtype=model.dtype_name,
            perplexity=round(found, 5),
            increase=round(found / expected - 1, 7),
        )
