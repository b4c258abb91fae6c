"""The seam between the runner and what computes: a model over its cache turns chunks of tokens into logits.

LoadedModel.over(cache) -> Forward        TorchForward   workers/models: torch, any machine; modules of transformers too
                                          NativeForward  workers/native: one call of the C library
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from workers.kv_memory import KvMemory
from workers.plan import Chunk


@dataclass(frozen=True, slots=True)
class Logits:
    """Of the rows that sample: of each chunk that does, in the order of the chunks, the row of its last token and then
    those of its draft."""

    values: npt.NDArray[np.float32]
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


class ServedShape(Protocol):
    """What an engine has to know of a model's sizes."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...

    @property
    def max_positions(self) -> int: ...

    @property
    def sliding_window(self) -> int | None: ...


class LoadedModel(Protocol):
    """Weights in memory, packed for this machine."""

    @property
    def shape(self) -> ServedShape: ...

    @property
    def dtype_name(self) -> str:
        """What activations are computed in, as `EngineConfig.dtype` names it."""

    @property
    def cache_dtype(self) -> npt.DTypeLike:
        """The type of keys and values, or one of its size; for `bytes_per_block`."""

    @property
    def kernels(self) -> str:
        """Which kernels it computes with, for people."""

    def new_cache(self, *, num_blocks: int, block_size: int) -> KvMemory: ...

    def over(self, cache: KvMemory) -> Forward:
        """Return the model at work over `cache`, which is a `new_cache` of it."""


if TYPE_CHECKING:
    from workers.models.llama import LlamaModel
    from workers.models.transformers_model import TransformersModel
    from workers.native.model import NativeModel

    _models: tuple[type[LoadedModel], ...] = (LlamaModel, NativeModel, TransformersModel)
