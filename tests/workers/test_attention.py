"""The CPU attention against the formula, over blocks in any order, mixed steps, and memory that others have used."""

from __future__ import annotations

import random

import pytest
import torch

from workers.attention.cache import KvCache
from workers.attention.cpu import CpuAttention
from workers.attention.layout import StepLayout, lay_out
from workers.attention.reference import ReferenceAttention
from workers.kv_memory import bytes_per_block
from workers.plan import Chunk
from workers.sequence import Sequence
from workers.types import GenerateWork, WorkId

BLOCK_SIZE, KV_HEADS, HEADS, DIM = 4, 2, 6, 8


def new_cache(num_blocks: int, dtype: torch.dtype = torch.float32) -> KvCache:
    return KvCache(
        num_layers=2,
        num_blocks=num_blocks,
        num_kv_heads=KV_HEADS,
        block_size=BLOCK_SIZE,
        head_dim=DIM,
        dtype=dtype,
    )


def chunk(start: int, num_tokens: int, table: list[int], *, samples: bool = False, adapter: str = "") -> Chunk:
    tokens = list(range(100, 100 + start + num_tokens))
    sequence = Sequence(GenerateWork(work_id=WorkId("test", 0), prompt=tokens, max_tokens=1, adapter=adapter))
    sequence.block_table = table
    return Chunk(sequence, start, num_tokens, samples)


def random_rows(layout: StepLayout, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    sizes = (HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(len(layout.tokens), heads, DIM).to(dtype) for heads in sizes)


def test_layout_puts_decodes_first() -> None:
    chunks = [
        chunk(0, 3, [5, 9], samples=True),
        chunk(6, 1, [1, 2], samples=True, adapter="a"),
        chunk(4, 6, [7, 3, 8], adapter="a"),
        chunk(0, 1, [4], samples=True),
    ]
    layout = lay_out(chunks, BLOCK_SIZE)
    assert layout.tokens.tolist() == [106, 100, 100, 101, 102, *range(104, 110)]
    assert layout.positions.tolist() == [6, 0, 0, 1, 2, *range(4, 10)]
    assert layout.blocks.tolist() == [2, 4, 5, 5, 5, 3, 3, 3, 3, 8, 8]
    assert layout.offsets.tolist() == [2, 0, 0, 1, 2, 0, 1, 2, 3, 0, 1]
    assert layout.sampling_chunks == (0, 1, 3)
    assert layout.sampling_rows.tolist() == [4, 0, 1]
    assert [(span.first, span.num_rows, span.start) for span in layout.spans] == [(2, 3, 0), (5, 6, 4)]
    assert layout.adapter_rows["a"].tolist() == [0, 5, 6, 7, 8, 9, 10]
    # Blocks 4, 5 and 8 are begun; 3 is begun and full; 2 was begun before.
    assert sorted(layout.begun_blocks.tolist()) == [4, 5, 8]


def test_layout_groups_decodes_by_context() -> None:
    lengths = [1, 20, 32, 33, 64, 70, 200]
    chunks = [chunk(length - 1, 1, list(range(-(-length // BLOCK_SIZE)))) for length in lengths]
    groups = lay_out(chunks, BLOCK_SIZE).decodes
    assert [group.rows.tolist() for group in groups] == [[0, 1, 2], [3, 4], [5], [6]]
    assert [group.tables.shape[1] for group in groups] == [8, 16, 18, 50]
    assert groups[0].tables[0].tolist() == [0] * 8
    assert groups[1].lengths.tolist() == [33, 64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_formula(dtype: torch.dtype) -> None:
    """Random universes of decodes and chunks; both write to caches of their own, step after step."""
    torch.manual_seed(1)
    generator = random.Random(1)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for _ in range(12):
        blocks = list(range(64))
        generator.shuffle(blocks)
        tables = [[blocks.pop() for _ in range(12)] for _ in range(5)]
        computed = [0] * 5
        caches = new_cache(64, dtype), new_cache(64, dtype)
        for _ in range(4):
            chunks = []
            for i, table in enumerate(tables):
                size = generator.choice([0, 1, 1, generator.randint(2, 11)])
                if size:
                    chunks.append(chunk(computed[i], size, table))
                    computed[i] += size
            if not chunks:
                continue
            layout = lay_out(chunks, BLOCK_SIZE)
            for layer in range(2):
                rows = random_rows(layout, dtype)
                actual, expected = (
                    backend.prepare(layout, cache).attend(layer, *rows)
                    for backend, cache in zip((CpuAttention(), ReferenceAttention()), caches, strict=True)
                )
                assert actual.dtype is dtype
                assert (actual - expected).abs().max() <= tolerance
                assert torch.equal(caches[0].keys[layer], caches[1].keys[layer])


def test_what_a_former_holder_left_does_no_harm() -> None:
    """A poisoned request leaves NaN in its blocks; the next holder masks what it has not written, which is no help
    against NaN: a block is made zero when its first place is written."""
    cache = new_cache(4)
    for store in (*cache.keys, *cache.values):
        store.fill_(float("nan"))
    start = lay_out([chunk(0, 5, [2, 0])], BLOCK_SIZE)
    decode = lay_out([chunk(5, 1, [2, 0])], BLOCK_SIZE)
    for layout in (start, decode):
        cache.clear(layout.begun_blocks)
        output = CpuAttention().prepare(layout, cache).attend(0, *random_rows(layout))
        assert output.isfinite().all()


def test_copies_are_read_before_they_are_written() -> None:
    cache = new_cache(3)
    for block in range(3):
        for store in (*cache.keys, *cache.values):
            store[block] = block
    cache.copy([(0, 1), (1, 2)])
    assert [cache.values[1][block].unique().tolist() for block in range(3)] == [[0.0], [0.0], [1.0]]


def test_bytes_per_block_is_what_the_pool_takes() -> None:
    cache = new_cache(5, torch.bfloat16)
    size = bytes_per_block(num_layers=2, num_kv_heads=KV_HEADS, block_size=BLOCK_SIZE, head_dim=DIM, dtype="u2")
    assert 5 * size == sum(store.numel() * 2 for store in (*cache.keys, *cache.values))
