"""The seam between the runner and what computes: a model over its cache turns chunks of tokens into logits.

LoadedModel.over(cache) -> Forward        TorchForward   workers/models: torch, any machine
                                          NativeForward  workers/native: one call of the C library
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from workers.attention.cache import KvCache
from workers.plan import Chunk
from workers.weights.shape import ModelShape


@dataclass(frozen=True, slots=True)
class Logits:
    """Of the rows that sample: of each chunk that does, in the order of the chunks, the row of its last token and then
    those of its draft."""

    values: torch.Tensor
    """[n, vocab_size] in fp32; may be overwritten, and is until the next call of `compute`."""
    best: Seq[int] | None = None
    """The lowest token of each row's largest logit, -1 for a row with a NaN or infinity; None if nobody looked."""


class Forward(Protocol):
    """Owns no sequences and draws no tokens. A step that fails leaves the cache usable: computing its chunks again
    writes the same values to the same places."""

    @property
    def adapters(self) -> Set[str]:
        """Names that a sequence may have."""

    def compute(self, chunks: Seq[Chunk], *, all_rows: bool = False) -> Logits:
        """Compute `chunks`, whose tokens and blocks are there. With `all_rows` it is one chunk, and the logits are
        those of each of its rows."""

    def close(self) -> None: ...


class LoadedModel(Protocol):
    """Weights in memory, packed for this machine."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def dtype_name(self) -> str:
        """What activations are computed in, as `EngineConfig.dtype` names it."""

    @property
    def cache_dtype(self) -> torch.dtype: ...

    @property
    def kernels(self) -> str:
        """Which kernels it computes with, for people."""

    def over(self, cache: KvCache) -> Forward:
        """Return the model at work over `cache`, which has this shape and `cache_dtype`."""


if TYPE_CHECKING:
    from workers.models.llama import LlamaModel
    from workers.native.model import NativeModel

    _models: tuple[type[LoadedModel], ...] = (LlamaModel, NativeModel)
