"""What this machine's processor can do, measured with the engine's own kernels: reading memory, products, whole steps.

Every figure is the best of several tries, so that other work on the machine disturbs it little. The weights of measured
steps are made up, in the sizes of a real model: their values change no time. Owns no arithmetic: `capacity` does.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from cluster.capacity import WeightFormat, layer_sizes
from workers import kernels
from workers.memory import free_memory
from workers.native import library
from workers.native.model import NativeDtype, NativeModel
from workers.native.packing import (
    PANEL,
    Format,
    PackedMatrix,
    aligned_bytes,
    num_panels,
    pack_bf16,
    pack_f32,
    quantise_q4,
    quantise_q8,
)
from workers.plan import Chunk
from workers.sequence import Sequence as EngineSequence
from workers.threads import set_threads
from workers.types import GenerateWork, WorkId
from workers.weights.packed import PackedLayer, PackedModel
from workers.weights.shape import ModelShape

_CACHE_LEVELS = Path("/sys/devices/system/cpu/cpu0/cache")
_LEAST_READ_BYTES = 256 << 20
_PRODUCT_ROWS, _PRODUCT_OUTPUTS, _PRODUCT_INPUTS = 64, 1024, 1024
_PRODUCTS = 8
"""In a row, so that starting threads is nothing beside them."""
_OPERATIONS = 2 * _PRODUCTS * _PRODUCT_ROWS * _PRODUCT_OUTPUTS * _PRODUCT_INPUTS
TRIES_S, MIN_TRIES = 0.3, 3
"""How long a figure is tried for, and how often at least: this process may be held up for longer."""
_MOST_MEMORY = 0.5
"""Of what is free may measured steps take."""

_PACK: dict[Format, Callable[[npt.NDArray[np.float32]], PackedMatrix]] = {
    Format.F32: pack_f32,
    Format.BF16: pack_bf16,
    Format.Q8: quantise_q8,
    Format.Q4: quantise_q4,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRun:
    """What steps are measured with."""

    dtype: NativeDtype
    threads: int
    context: int
    """Tokens that each sequence has in the cache."""
    block_size: int


def measure_bandwidth(threads: int) -> float:
    """Return the bytes a second that so many threads read from memory, together."""
    values = np.ones(_far_larger_than_cache() // 4 // threads * threads, dtype=np.int32)
    parts = np.split(values, threads)
    return values.nbytes / _best_s([part.max for part in parts])


def measure_products(form: Format, arithmetic: int, threads: int) -> float:
    """Return the operations a second that so many threads of the C library reach, together, on data in their caches."""
    found = library.library()
    assert found is not None
    operands = [_Operands(_PACK[form]) for _ in range(threads)]
    return threads * _OPERATIONS / _best_s([partial(own.multiply, found, arithmetic) for own in operands])


def measure_torch_products(dtype: torch.dtype, threads: int) -> float:
    """Return the operations a second that the engine's product through torch reaches."""
    set_threads(threads)
    product = kernels.pack(torch.full((_PRODUCT_OUTPUTS, _PRODUCT_INPUTS), 0.01), None, dtype)
    x = torch.ones(_PRODUCT_ROWS, _PRODUCT_INPUTS, dtype=dtype)

    def multiply() -> None:
        for _ in range(_PRODUCTS):
            product(x)

    return _OPERATIONS / _best_s([multiply])


def measure_steps(shape: ModelShape, weights: WeightFormat, run: StepRun, rows: Iterable[int]) -> dict[int, float]:
    """Return milliseconds of an engine's step by how many sequences each have one row in it.

    The C library computes it whole, but for the sampling. What memory has no room for is left out.
    """
    blocks = -(-(run.context + 1) // run.block_size)
    model = NativeModel(_made_up(shape, weights), run.dtype, threads=run.threads)
    elements = shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * run.block_size * blocks
    room = int(free_memory() * _MOST_MEMORY) // (elements * np.dtype(model.cache_dtype).itemsize)
    wanted = [count for count in rows if count <= room]
    if not wanted:
        return {}
    cache = model.new_cache(num_blocks=max(wanted) * blocks, block_size=run.block_size)
    cache.pool.fill(0.01)  # memory that was never written is read from one page in a cache
    forward = model.over(cache)
    try:
        steps = {count: _decodes(count, run.context, blocks) for count in wanted}
        return {count: 1e3 * _best_of(partial(forward.compute, chunks)) for count, chunks in steps.items()}
    finally:
        forward.close()


def fits(num_bytes: int) -> bool:
    """Whether measured steps may take so much memory."""
    return num_bytes <= free_memory() * _MOST_MEMORY


def _far_larger_than_cache() -> int:
    sizes = [_bytes(path.read_text().strip()) for path in _CACHE_LEVELS.glob("index*/size")]
    return max(_LEAST_READ_BYTES, 4 * max(sizes, default=0))


def _bytes(text: str) -> int:
    """Read "32768K"."""
    return int(text.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(text[-1], 1)


class _Operands:
    """A product of one thread."""

    def __init__(self, pack: Callable[[npt.NDArray[np.float32]], PackedMatrix]) -> None:
        self._packed = _matrix(pack, _PRODUCT_OUTPUTS, _PRODUCT_INPUTS)
        self._x = np.full((_PRODUCT_ROWS, _PRODUCT_INPUTS), 0.5, dtype=np.float32)
        self._y = np.empty((_PRODUCT_ROWS, _PRODUCT_OUTPUTS), dtype=np.float32)
        self._matrix = library.Matrix(
            self._packed.data.ctypes.data, None, int(self._packed.format), _PRODUCT_OUTPUTS, _PRODUCT_INPUTS
        )

    def multiply(self, found: ctypes.CDLL, arithmetic: int) -> None:
        x, y = self._x.ctypes.data, self._y.ctypes.data
        for _ in range(_PRODUCTS):
            if found.octavo_linear(0, ctypes.byref(self._matrix), arithmetic, x, _PRODUCT_ROWS, 0, y):
                raise MemoryError(f"no memory for a product of {_PRODUCT_ROWS} rows")


def _best_s(tasks: Sequence[Callable[[], object]]) -> float:
    """Return the seconds in which all tasks, which release the GIL, end when they begin together; the best of some."""
    with ThreadPoolExecutor(len(tasks)) as threads:

        def together() -> None:
            for task in [threads.submit(task) for task in tasks]:
                task.result()

        return _best_of(together)


def _best_of(act: Callable[[], object]) -> float:
    """Return the seconds that `act` takes, the best of some."""
    best, tries, began = float("inf"), 0, time.perf_counter()
    while tries < MIN_TRIES or time.perf_counter() - began < TRIES_S:
        start = time.perf_counter()
        act()
        best = min(best, time.perf_counter() - start)
        tries += 1
    return best


def _matrix(pack: Callable[[npt.NDArray[np.float32]], PackedMatrix], outputs: int, inputs: int) -> PackedMatrix:
    """Return a matrix all of whose panels are the same, which takes no time to make."""
    panel = pack(np.random.default_rng(0).standard_normal((PANEL, inputs), dtype=np.float32) * np.float32(0.02))
    data = aligned_bytes(num_panels(outputs) * panel.data.size)
    data.reshape(-1, panel.data.size)[:] = panel.data
    return replace(panel, outputs=outputs, data=data)


def _made_up(shape: ModelShape, weights: WeightFormat) -> PackedModel:
    """Return a model whose layers take turns in memory that is far larger than the cache, or have all their own."""
    pack = _PACK[weights.layers]
    ones = np.ones(max(shape.hidden_size, shape.head_dim), dtype=np.float32)
    norm, head_norm = ones[: shape.hidden_size], ones[: shape.head_dim] if shape.qk_norm else None

    def layer() -> PackedLayer:
        qkv, output, gate_up, down = (_matrix(pack, *size) for size in layer_sizes(shape))
        return PackedLayer(
            attention_norm=norm,
            ffn_norm=norm,
            query_norm=head_norm,
            key_norm=head_norm,
            qkv=qkv,
            output=output,
            gate_up=gate_up,
            down=down,
        )

    layers = [layer()]
    layer_bytes = sum(part.data.size for part in (layers[0].qkv, layers[0].output, layers[0].gate_up, layers[0].down))
    num_own = min(shape.num_layers, -(-_far_larger_than_cache() // layer_bytes))
    layers += [layer() for _ in range(num_own - 1)]
    table = _matrix(_PACK[weights.tables], shape.vocab_size, shape.hidden_size)
    return PackedModel(
        shape=shape,
        embedding=table,
        head=table,
        norm=norm,
        layers=tuple(layers[number % num_own] for number in range(shape.num_layers)),
    )


def _decodes(count: int, context: int, blocks: int) -> list[Chunk]:
    """Return one row of each of `count` sequences, with `context` tokens before it."""
    chunks = []
    for number in range(count):
        work = GenerateWork(work_id=WorkId("plan", number), prompt=[0] * (context + 1), max_tokens=1)
        sequence = EngineSequence(work)
        sequence.block_table = list(range(number * blocks, (number + 1) * blocks))
        chunks.append(Chunk(sequence, context, 1, samples=True))
    return chunks
