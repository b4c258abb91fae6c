"""A Llama-family model computed by the C library: packed weights handed over once, then one call per step.

Owns the structures that the library reads and the memory they point to, for as long as anything computes. Knows tokens,
rows and blocks; no sequences beyond their tokens and tables, no sampling. Knows no adapters.
"""

from __future__ import annotations

import ctypes
import enum
import weakref
from array import array
from collections.abc import Sequence as Seq
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from workers.forward import Logits
from workers.kv_memory import KvMemory
from workers.native import library
from workers.native.packing import GROUP, PackedMatrix
from workers.plan import Chunk
from workers.rotary import inverse_frequencies
from workers.weights.packed import PackedLayer, PackedModel
from workers.weights.shape import ModelShape

_CACHE_TYPES = {np.dtype(np.float32): library.CACHE_F32, np.dtype(np.float16): library.CACHE_F16}


class NativeDtype(enum.Enum):
    """What `EngineConfig.dtype` means here: how products treat activations, and what the cache keeps."""

    FP32 = (library.EXACT, np.float32)
    BF16 = (library.EXACT, np.float16)
    """Nothing is rounded but keys and values, and these less than to bf16."""
    INT8 = (library.INT8, np.float16)

    def __init__(self, arithmetic: int, cache: type[np.floating[Any]]) -> None:
        self.arithmetic = arithmetic
        self.cache: np.dtype[Any] = np.dtype(cache)


def can_round(shape: ModelShape) -> bool:
    """Whether the activations of such a model fall into whole groups that int8 can have a scale for."""
    return not any(size % GROUP for size in (shape.hidden_size, shape.head_dim, shape.ffn_size))


class NativeModel:
    """INT8 is for shapes that `can_round`."""

    adapters: Set[str] = frozenset()

    def __init__(self, packed: PackedModel, dtype: NativeDtype, *, threads: int) -> None:
        found = library.library()
        assert found is not None
        assert dtype is not NativeDtype.INT8 or can_round(packed.shape)
        self.shape: ModelShape = packed.shape
        self.dtype_name = dtype.name.lower()
        self.cache_dtype = dtype.cache
        self.kernels = f"native {library.instructions()}"
        self._library = found
        self._threads = threads
        self._frequencies = np.ascontiguousarray(inverse_frequencies(self.shape.rope, self.shape.head_dim))
        self._packed = packed
        self._layers = (library.Layer * len(packed.layers))(*map(_layer, packed.layers))
        self._model = library.Model(
            hidden=self.shape.hidden_size,
            num_layers=self.shape.num_layers,
            num_heads=self.shape.num_heads,
            num_kv_heads=self.shape.num_kv_heads,
            head_dim=self.shape.head_dim,
            ffn=self.shape.ffn_size,
            vocab=self.shape.vocab_size,
            arithmetic=dtype.arithmetic,
            norm_eps=self.shape.norm_eps,
            norm=_address(packed.norm),
            frequencies=_address(self._frequencies),
            embedding=_matrix(packed.embedding),
            head=_matrix(packed.head),
            layers=self._layers,
        )

    def new_cache(self, *, num_blocks: int, block_size: int) -> KvMemory:
        """Return a cache for this model."""
        return KvMemory(
            num_layers=self.shape.num_layers,
            num_blocks=num_blocks,
            num_kv_heads=self.shape.num_kv_heads,
            block_size=block_size,
            head_dim=self.shape.head_dim,
            dtype=self.cache_dtype,
        )

    def over(self, cache: KvMemory) -> NativeForward:
        dtype = cache.pool.dtype
        assert dtype == self.cache_dtype
        layout = library.Cache(
            data=cache.address, type=_CACHE_TYPES[dtype], num_blocks=cache.num_blocks, block_size=cache.block_size
        )
        context = self._library.octavo_open(ctypes.byref(self._model), ctypes.byref(layout), self._threads)
        if not context:
            raise MemoryError(f"no memory for a model's buffers and {self._threads} threads")
        return NativeForward(self, _Context(self._library, context, (self, cache, layout)), cache.block_size)


class _Context:
    """A context of the library, closed with the last reference, and what it points to."""

    def __init__(self, lib: ctypes.CDLL, pointer: int, kept: tuple[object, ...]) -> None:
        self.run = lib.octavo_run
        self.pointer = pointer
        self._kept = kept
        self.close = weakref.finalize(self, lib.octavo_close, pointer)
        # At exit a thread may still be in a step, which would go on in memory that was given back.
        self.close.atexit = False


class NativeForward:
    def __init__(self, model: NativeModel, context: _Context, block_size: int) -> None:
        self._vocab_size = model.shape.vocab_size
        self._context = context
        self._block_size = block_size
        self._buffers = _Buffers.sized(1, self._vocab_size)

    @property
    def adapters(self) -> Set[str]:
        return NativeModel.adapters

    def compute(self, chunks: Seq[Chunk], *, all_rows: bool = False) -> Logits:
        tokens, tables, runs, sampling = array("i"), array("i"), array("i"), array("i")
        for chunk in chunks:
            sequence, first, end = chunk.sequence, len(tokens), chunk.start + chunk.num_rows
            runs.extend((first, chunk.num_rows, chunk.start, len(tables)))
            tokens.extend(sequence.tokens[chunk.start : chunk.start + chunk.num_tokens])
            tokens.extend(chunk.draft)
            tables.extend(sequence.block_table[: -(-end // self._block_size)])
            if all_rows or chunk.samples:
                num_wanted = chunk.num_rows if all_rows else 1 + len(chunk.draft)
                sampling.extend(range(len(tokens) - num_wanted, len(tokens)))
        buffers = self._reserve(len(sampling))
        step = library.Step(
            num_rows=len(tokens),
            num_chunks=len(chunks),
            num_sampling=len(sampling),
            tokens=_start(tokens),
            chunks=_start(runs),
            tables=_start(tables),
            sampling=_start(sampling),
            logits=_address(buffers.logits),
            best=_address(buffers.best),
        )
        assert self._context.close.alive, "computes nothing after close"
        result = self._context.run(self._context.pointer, ctypes.byref(step))
        if result == library.NOT_THERE:
            raise IndexError(f"a token is not in [0, {self._vocab_size}), or a block is not the cache's")
        if result:
            raise MemoryError(f"no memory for a step of {len(tokens)} rows")
        return Logits(buffers.logits[: len(sampling)], buffers.best[: len(sampling)].tolist())

    def close(self) -> None:
        self._context.close()

    def _reserve(self, num_rows: int) -> _Buffers:
        """Return buffers for `num_rows` rows of logits, those of the last step if they are large enough."""
        if num_rows > len(self._buffers.best):
            self._buffers = _Buffers.sized(-(-num_rows // 16) * 16, self._vocab_size)
        return self._buffers


@dataclass(frozen=True, slots=True)
class _Buffers:
    logits: npt.NDArray[np.float32]
    best: npt.NDArray[np.int32]

    @classmethod
    def sized(cls, rows: int, vocab_size: int) -> _Buffers:
        return cls(np.empty((rows, vocab_size), dtype=np.float32), np.empty(rows, dtype=np.int32))


def _layer(layer: PackedLayer) -> library.Layer:
    return library.Layer(
        attention_norm=_address(layer.attention_norm),
        ffn_norm=_address(layer.ffn_norm),
        query_norm=_address(layer.query_norm),
        key_norm=_address(layer.key_norm),
        qkv=_matrix(layer.qkv),
        output=_matrix(layer.output),
        gate_up=_matrix(layer.gate_up),
        down=_matrix(layer.down),
    )


def _matrix(matrix: PackedMatrix) -> library.Matrix:
    return library.Matrix(
        data=_address(matrix.data),
        bias=_address(matrix.bias),
        format=int(matrix.format),
        outputs=matrix.outputs,
        inputs=matrix.inputs,
    )


def _address(values: np.ndarray[Any, Any] | None) -> int | None:
    if values is None:
        return None
    assert values.flags.c_contiguous
    return values.ctypes.data


def _start(values: array[int]) -> int:
    return values.buffer_info()[0]
