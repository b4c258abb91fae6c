"""The C library's attention, with norms, rotary embedding and cache writes, against the formula; both of its builds."""

from __future__ import annotations

import ctypes
import random
from array import array
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch.nn.functional import rms_norm

from workers.attention.cache import KvCache
from workers.attention.layout import lay_out
from workers.attention.reference import ReferenceAttention
from workers.models.llama import rotate, turns
from workers.native import library
from workers.plan import Chunk
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId

pytestmark = [
    pytest.mark.skipif(library.library() is None, reason="the C library is not built"),
    pytest.mark.parametrize("portable", [0, 1], ids=["best", "portable"]),
]

LAYER, NUM_LAYERS, EPS = 1, 2, 1e-5
NAN = float("nan")
CACHE_TYPES = {torch.float32: library.CACHE_F32, torch.float16: library.CACHE_F16}


@dataclass
class Universe:
    """A model's attention, a cache full of NaN, and sequences in blocks that lie anywhere."""

    heads: int
    kv_heads: int
    dim: int
    block_size: int
    dtype: torch.dtype = torch.float32
    has_norms: bool = False

    def __post_init__(self) -> None:
        # Made anew for every universe: what one test reads must not depend on those before.
        self.random = random.Random(1)
        self.generator = torch.Generator().manual_seed(1)
        self.frequencies = 1.0 / 10_000.0 ** (torch.arange(0, self.dim, 2).float() / self.dim)
        self.norms = self.randn(2, self.dim) * 0.2 + 1 if self.has_norms else None

    def randn(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator)

    def begin(self, sizes: list[tuple[int, int]]) -> list[Chunk]:
        """Make a cache and, for each (start, rows), a sequence whose first `start` positions are in it."""
        counts = [-(-(start + rows) // self.block_size) for start, rows in sizes]
        self.cache = KvCache(
            num_layers=NUM_LAYERS,
            num_blocks=sum(counts) + 3,
            num_kv_heads=self.kv_heads,
            block_size=self.block_size,
            head_dim=self.dim,
            dtype=self.dtype,
        )
        for store in (*self.cache.keys, *self.cache.values):
            store.fill_(NAN)
        blocks = self.random.sample(range(self.cache.num_blocks), sum(counts))
        chunks = []
        for (start, rows), count in zip(sizes, counts, strict=True):
            work = GenerateWork(work_id=WorkId("test", 0), prompt=[1] * (start + rows), max_tokens=1)
            sequence = Sequence(work)
            sequence.block_table = [blocks.pop() for _ in range(count)]
            chunks.append(Chunk(sequence, start, rows, samples=False))
            if start:
                before = self.index(Chunk(sequence, 0, start, samples=False))
                past = (self.randn(start, self.kv_heads, self.dim).to(self.dtype) for _ in range(2))
                self.cache.write(LAYER, before, *past)
        return chunks

    def index(self, chunk: Chunk) -> torch.Tensor:
        layout = lay_out([chunk], self.block_size)
        return self.cache.row_index(layout.blocks, layout.offsets)

    def rows_of(self, chunks: list[Chunk]) -> torch.Tensor:
        return self.randn(sum(chunk.num_rows for chunk in chunks), self.heads + 2 * self.kv_heads, self.dim)

    def run(self, portable: int, chunks: list[Chunk], qkv: torch.Tensor) -> torch.Tensor:
        """Return what the library makes of `qkv` [rows, heads + 2 kv_heads, dim]: [rows, heads * dim]."""
        lib = library.library()
        assert lib is not None
        runs, tables, first = array("i"), array("i"), 0
        for chunk in chunks:
            runs.extend((first, chunk.num_rows, chunk.start, len(tables)))
            tables.extend(chunk.sequence.block_table)
            first += chunk.num_rows
        norms = None if self.norms is None else self.norms.data_ptr()
        layers = (library.Layer * NUM_LAYERS)()
        layers[LAYER].query_norm = norms
        layers[LAYER].key_norm = norms and norms + 4 * self.dim
        model = library.Model(
            num_layers=NUM_LAYERS,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.dim,
            norm_eps=EPS,
            frequencies=self.frequencies.data_ptr(),
            layers=layers,
        )
        cache = library.Cache(self.cache.address, CACHE_TYPES[self.dtype], self.cache.num_blocks, self.block_size)
        step = library.Step(
            num_rows=first,
            num_chunks=len(chunks),
            chunks=runs.buffer_info()[0],
            tables=tables.buffer_info()[0],
        )
        changed, out = qkv.clone(), torch.full((first, self.heads * self.dim), NAN)
        pointers = [ctypes.byref(structure) for structure in (model, cache, step)]
        assert lib.octavo_attention(portable, *pointers, LAYER, changed.data_ptr(), out.data_ptr()) == 0
        return out

    def expect(self, chunks: list[Chunk], qkv: torch.Tensor) -> torch.Tensor:
        """Return what the formula makes of `qkv`, over the keys and values that the library stored; assert that these
        are right to the last bit or two."""
        outputs = []
        for chunk, rows in zip(chunks, torch.split(qkv, [chunk.num_rows for chunk in chunks]), strict=True):
            layout, index = lay_out([chunk], self.block_size), self.index(chunk)
            queries, keys, values = torch.split(rows, [self.heads, self.kv_heads, self.kv_heads], dim=1)
            cos, sin = turns(layout.positions, self.frequencies)
            if self.norms is not None:
                queries, keys = (
                    rms_norm(part, (self.dim,), norm, EPS)
                    for part, norm in zip((queries, keys), self.norms, strict=True)
                )
            stored = [
                store[LAYER].view(-1, self.dim)[index].view_as(keys) for store in (self.cache.keys, self.cache.values)
            ]
            precision = 1e-6 if self.dtype is torch.float32 else 2e-3
            torch.testing.assert_close(stored[0].float(), rotate(keys, cos, sin), atol=precision, rtol=precision)
            assert torch.equal(stored[1], values.to(self.dtype))
            reference = ReferenceAttention().prepare(layout, self.cache)
            outputs.append(reference.attend(LAYER, rotate(queries, cos, sin), *stored))
        return torch.cat(outputs)

    def count_stored(self) -> int:
        """How many keys and values of the cache are not NaN, all layers together."""
        return sum(int((~store.isnan().all(-1)).sum()) for store in (*self.cache.keys, *self.cache.values))


def assert_agrees(universe: Universe, portable: int, sizes: list[tuple[int, int]]) -> None:
    chunks = universe.begin(sizes)
    qkv = universe.rows_of(chunks)
    actual = universe.run(portable, chunks, qkv)
    expected = universe.expect(chunks, qkv)
    assert (actual - expected).abs().max() <= 2e-6 * max(1, universe.dim / 128)
    tokens = sum(start + rows for start, rows in sizes)
    assert universe.count_stored() == 2 * tokens * universe.kv_heads, "something was stored where it does not belong"


MIXED = [(0, 1), (7, 1), (0, 23), (300, 1), (40, 19), (511, 2), (15, 1), (16, 1), (1, 3)]


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1), (9, 1)], ids=str)
def test_agrees_with_the_formula(portable: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    assert_agrees(Universe(heads, kv_heads, dim, 16, dtype), portable, MIXED)


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 7, 256])
def test_any_size_of_block(portable: int, block_size: int, dtype: torch.dtype) -> None:
    assert_agrees(Universe(6, 2, 64, block_size, dtype), portable, MIXED)


@pytest.mark.parametrize("share", [1, 2, 3, 4, 5, 6, 7, 8, 12, 25])
def test_any_number_of_queries_to_a_key(portable: int, share: int) -> None:
    assert_agrees(Universe(2 * share, 2, 64, 16), portable, [(0, 1), (270, 1), (13, 1), (37, 10)])


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("dim", [2, 10, 24, 36, 144, 176, 256, 384, 512, 1024])
def test_any_even_size_of_head(portable: int, dim: int, dtype: torch.dtype) -> None:
    assert_agrees(Universe(3, 1, dim, 4, dtype), portable, [(0, 1), (120, 1), (30, 60)])


@pytest.mark.parametrize("has_norms", [False, True])
def test_long_contexts_and_chunks(portable: int, has_norms: bool) -> None:
    universe = Universe(4, 2, 128, 16, torch.float16, has_norms)
    assert_agrees(universe, portable, [(2047, 1), (0, 200), (1000, 130), (1535, 1)])


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
def test_scores_of_any_size(portable: int, dtype: torch.dtype) -> None:
    """Scores in the thousands, the largest first, last or anywhere: the softmax must neither overflow nor forget."""
    universe = Universe(6, 2, 64, 16, dtype)
    chunks = universe.begin([(600, 1), (200, 40), (0, 130)])
    qkv = universe.rows_of(chunks)
    qkv[:, :6] *= 300
    actual = universe.run(portable, chunks, qkv)
    expected = universe.expect(chunks, qkv)
    assert (actual - expected).abs().max() <= 1e-3
    assert (actual - expected).abs().mean() <= 1e-5


@pytest.mark.parametrize("dtype", CACHE_TYPES, ids=str)
@pytest.mark.parametrize("poison", [NAN, float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 2)], ids=str)
def test_poison_reaches_those_that_see_it_and_no_others(
    portable: int, heads: int, kv_heads: int, poison: float, dtype: torch.dtype
) -> None:
    """A value that is not finite, at one row of a chunk: the rows before it, in the same tile of a product or not, do
    not see it, and those from it on must tell."""
    for start, poisoned in [(0, 0), (0, 1), (5, 7), (100, 50), (30, 63), (0, 99)]:
        universe = Universe(heads, kv_heads, 64, 16, dtype)
        chunks = universe.begin([(start, 100), (start, 1)])
        qkv = universe.rows_of(chunks)
        qkv[poisoned, heads + kv_heads :] = poison
        is_finite = universe.run(portable, chunks, qkv).isfinite()
        assert is_finite[:poisoned].all()
        assert not is_finite[poisoned:100].any()
        assert is_finite[100].all()


@pytest.mark.parametrize("heads", [2, 6])
def test_poison_in_a_key_is_not_hidden(portable: int, heads: int) -> None:
    for count in (1, 20):
        universe = Universe(heads, 2, 64, 16)
        chunks = universe.begin([(300, count), (10, 1)])
        universe.cache.keys[LAYER][chunks[0].sequence.block_table[3], :, 5, 17] = NAN
        out = universe.run(portable, chunks, universe.rows_of(chunks))
        assert out[:count].isnan().all()
        assert out[count].isfinite().all()


def test_halves_are_rounded_as_torch_rounds(portable: int) -> None:
    """Every kind of number: normal, subnormal, halfway between two halves, too large, and what is no number."""
    bits = np.concatenate(
        (
            np.arange(0, 1 << 32, 65_537, dtype=np.uint32),
            np.arange(0x3300_0000, 0x3880_2000, 0x0000_0FFF, dtype=np.uint32),
            np.arange(0x477F_E000, 0x4780_1000, 0x0000_0100, dtype=np.uint32),
        )
    )
    values = torch.from_numpy(bits.view(np.float32).copy())
    dim = 1022
    values = torch.nn.functional.pad(values, (0, -len(values) % dim)).view(-1, 1, dim)
    universe = Universe(1, 1, dim, 16, torch.float16)
    chunks = universe.begin([(0, len(values))])
    index = universe.index(chunks[0])
    universe.run(portable, chunks, torch.cat((values * 0, values * 0, values), dim=1))
    stored = universe.cache.values[LAYER].view(-1, dim)[index].view_as(values)
    expected = values.half()
    is_number = ~values.isnan()
    assert torch.equal(stored.isnan(), values.isnan())
    assert torch.equal(stored[is_number].view(torch.int16), expected[is_number].view(torch.int16))
