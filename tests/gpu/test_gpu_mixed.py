"""Steps with chunks of prompts: what the device receives of one says the same with padding as without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from workers.device import DeviceStep, Ints
from workers.gpu import mixed
from workers.gpu.flash import HostSpans
from workers.gpu.layout import StepMemory
from workers.gpu.mixed import (
    MAX_GRAPH_FLOP,
    MAX_PADDING_FLOP,
    MixedRows,
    MixedSize,
    MixedSizes,
    arrange,
    padding,
    singles_of,
)
from workers.gpu.upload import Upload

NUM_SLOTS = SPARE = 12
BLOCK_SIZE = 4
ROWS = (4, 8, 16)
SINGLES = (2, 4)
MAX_CHUNKS, MAX_CONTEXT, CHUNK_TOKENS = 3, 14, 10
Row = tuple[int, int]
"""Slot and position."""


class Chunk(NamedTuple):
    start: int
    num_rows: int
    samples: bool


@dataclass(frozen=True, slots=True)
class Said:
    """A step as kernels read it, padding apart."""

    singles: list[Row]
    chunks: list[tuple[list[Row], int, list[int]]]
    """Rows, length, and the blocks of as many tokens."""
    sampling: list[Row]


@pytest.fixture(autouse=True, scope="module")
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixed, "_ROWS", ROWS)
        patch.setattr(mixed, "MAX_CHUNKS", MAX_CHUNKS)
        yield


@pytest.fixture(scope="module")
def memory() -> StepMemory:
    """Each slot has blocks of its own, and the spare slot only the spare block."""
    memory = StepMemory(
        num_slots=NUM_SLOTS, max_tokens=31, block_size=BLOCK_SIZE, num_blocks=96, device=torch.device("cpu")
    )
    memory.tables[:NUM_SLOTS] = torch.arange(NUM_SLOTS * memory.max_blocks).view(NUM_SLOTS, memory.max_blocks)
    return memory


def some_sizes(**keys: float) -> MixedSizes:
    options = {"chunk_tokens": CHUNK_TOKENS, "max_context": MAX_CONTEXT, "flop_per_row": 1.0} | keys
    return MixedSizes(SINGLES, **options)  # type: ignore[arg-type]


def step_of(chunks: Sequence[Chunk]) -> DeviceStep:
    """Return a step of `chunks`, each of a slot of its own, the last slot first."""
    starts, counts, samples = zip(*chunks, strict=True)
    slots = np.arange(NUM_SLOTS, dtype=np.int32)[::-1][: len(chunks)]
    return DeviceStep(
        slots=slots,
        starts=np.array(starts, dtype=np.int32),
        counts=np.array(counts, dtype=np.int32),
        num_chunks=len(chunks),
        is_decode=False,
        goes_on=False,
        samples=np.array(samples, dtype=np.bool_),
    )


def exact_size(chunks: Sequence[Chunk]) -> MixedSize:
    single = next((i for i, chunk in enumerate(chunks) if chunk.num_rows > 1), len(chunks))
    return MixedSize(
        singles=single,
        rows=sum(chunk.num_rows for chunk in chunks[single:]),
        chunks=len(chunks) - single,
        samples=sum(chunk.samples for chunk in chunks),
        max_rows=max(chunk.num_rows for chunk in chunks),
        max_length=max((chunk.start + chunk.num_rows for chunk in chunks[single:]), default=0),
    )


def what_is_said(chunks: Sequence[Chunk], memory: StepMemory) -> Said:
    said = Said([], [], [])
    num_singles = exact_size(chunks).singles
    for i, chunk in enumerate(chunks):
        slot, length = NUM_SLOTS - 1 - i, chunk.start + chunk.num_rows
        rows = [(slot, position) for position in range(chunk.start, length)]
        if i < num_singles:
            said.singles.extend(rows)
        else:
            said.chunks.append((rows, length, memory.tables[slot, : -(-length // BLOCK_SIZE)].tolist()))
        if chunk.samples:
            said.sampling.append(rows[-1])
    return said


def what_is_read(size: MixedSize, parts: list[Ints], host: HostSpans | None, memory: StepMemory) -> Said:
    """Send `parts` and return what they say; assert that all the rest is padding, and behind what is none."""
    upload, received = Upload(1_000, is_pinned=False), torch.full((1_000,), -1, dtype=torch.int32)
    assert [upload.add(part) for part in parts] == size.places()
    upload.send(received, memory.cells)
    read = MixedRows.of(size, received, memory, host)
    rows = list(zip(read.all.slots.tolist(), read.all.positions.tolist(), strict=True))
    own = list(zip(read.own.slots.tolist(), read.own.positions.tolist(), strict=True))
    sampling = read.sampling.tolist()
    assert (len(rows), len(own), len(sampling)) == (size.num_rows, size.samples, size.samples)
    num_own = len(without_padding(own))
    assert [rows[i] for i in sampling[:num_own]] == own[:num_own]
    assert sampling[num_own:] == [0] * (size.samples - num_own)
    said = Said(without_padding(rows[: size.singles]), [], own[:num_own])
    spans = read.spans
    if spans is None:
        assert size.chunks == size.rows == 0
        return said
    assert (spans.max_rows, spans.max_length, spans.host) == (size.max_rows, size.max_length, host)
    of_chunks = list(zip(spans.rows.slots.tolist(), spans.rows.positions.tolist(), strict=True))
    assert of_chunks == rows[size.singles :]
    ends, lengths = spans.ends.tolist(), spans.lengths.tolist()
    assert (len(ends), len(lengths), len(spans.tables)) == (size.chunks + 1, size.chunks, size.chunks)
    for first, end, length, table in zip(ends, ends[1:], lengths, spans.tables.tolist(), strict=False):
        if first < end:
            assert end - first <= spans.max_rows
            assert length <= spans.max_length
            assert len(said.chunks) == sum(end <= first for end in ends[1:]), "padding is behind all chunks"
            said.chunks.append((of_chunks[first:end], length, table[: -(-length // BLOCK_SIZE)]))
        else:
            assert length == 0
            assert set(table) == {memory.tables[SPARE, 0].item()}
    assert of_chunks[ends[-1] :] == [(SPARE, 0)] * (size.rows - ends[-1])
    if host is not None:
        assert host == (ends[: len(host[0])], lengths[: len(host[1])])
        assert len(host[1]) == len(said.chunks)
    return said


def without_padding(rows: list[Row]) -> list[Row]:
    """Return those before the spare slot's, which must be padding."""
    kept = [row for row in rows if row[0] != SPARE]
    assert rows == kept + [(SPARE, 0)] * (len(rows) - len(kept))
    return kept


STARTS = st.integers(0, 12)
STEPS = st.tuples(
    st.lists(st.builds(Chunk, STARTS, st.just(1), st.booleans()), max_size=5),
    st.lists(st.builds(Chunk, STARTS, st.integers(1, 6), st.booleans()), max_size=4),
).map(lambda parts: [*parts[0], *parts[1]])
NOTHING_DRAWN = [Chunk(3, 1, False), Chunk(0, 5, False)]
ONE_ROW_LAST = [Chunk(9, 1, True), Chunk(0, 4, True), Chunk(12, 1, True), Chunk(2, 1, False)]


@given(STEPS.filter(bool))
@example(NOTHING_DRAWN)
@example(ONE_ROW_LAST)
def test_without_graphs_a_step_is_what_it_says(memory: StepMemory, chunks: list[Chunk]) -> None:
    size, parts, host = arrange(step_of(chunks), MixedSizes.none(), SPARE)
    assert size == exact_size(chunks)
    assert what_is_read(size, parts, host, memory) == what_is_said(chunks, memory)


@given(STEPS.filter(bool))
@example(NOTHING_DRAWN)
@example(ONE_ROW_LAST)
def test_padding_changes_nothing_of_what_a_step_says(memory: StepMemory, chunks: list[Chunk]) -> None:
    size, parts, host = arrange(step_of(chunks), some_sizes(), SPARE)
    exact = exact_size(chunks)
    is_small = exact.singles <= SINGLES[-1] and exact.rows <= CHUNK_TOKENS and exact.max_length <= MAX_CONTEXT
    if is_small and 0 < exact.chunks <= MAX_CHUNKS:
        singles = next(number for number in (0, *SINGLES) if number >= exact.singles)
        rows = next(number for number in (4, 8, CHUNK_TOKENS) if number >= exact.rows)
        assert size == MixedSize(singles, rows, MAX_CHUNKS, singles + MAX_CHUNKS, rows, MAX_CONTEXT)
    else:
        assert size == exact
    assert what_is_read(size, parts, host, memory) == what_is_said(chunks, memory)


def test_a_step_by_hand() -> None:
    """Two decodes, the second of which draws nothing, and prompts of three tokens and of one behind its first eight."""
    chunks = [Chunk(5, 1, True), Chunk(7, 1, False), Chunk(0, 3, False), Chunk(8, 1, True)]
    size, parts, host = arrange(step_of(chunks), MixedSizes.none(), SPARE)
    assert size == MixedSize(singles=2, rows=4, chunks=2, samples=2, max_rows=3, max_length=9)
    own = [[11, 10, 9, 9, 9, 8], [5, 7, 0, 1, 2, 8], [0, 5], [11, 8], [5, 8]]
    of_chunks = [[9, 9, 9, 8], [0, 1, 2, 8], [9, 8], [0, 3, 4], [3, 9]]
    assert [part.tolist() for part in parts] == own + of_chunks
    assert host == ([0, 3, 4], [3, 9])
    size, parts, host = arrange(step_of(chunks[1:]), some_sizes(), SPARE)
    assert size == MixedSize(singles=2, rows=4, chunks=3, samples=5, max_rows=4, max_length=MAX_CONTEXT)
    own = [[11, 12, 10, 10, 10, 9], [7, 0, 0, 1, 2, 8], [5, 0, 0, 0, 0], [9, 12, 12, 12, 12], [8, 0, 0, 0, 0]]
    of_chunks = [[10, 10, 10, 9], [0, 1, 2, 8], [10, 9, 12], [0, 3, 4, 4], [3, 9, 0]]
    assert [part.tolist() for part in parts] == own + of_chunks
    assert host == ([0, 3, 4], [3, 9])
    assert all(part.dtype == np.int32 for part in parts)


def test_a_step_that_is_nothing_but_padding_says_nothing(memory: StepMemory) -> None:
    for size in some_sizes().all():
        assert what_is_read(size, padding(size, SPARE), None, memory) == Said([], [], [])


def test_a_step_is_padded_to_the_next_size_unless_there_is_none() -> None:
    sizes = some_sizes()
    size = MixedSize(singles=1, rows=5, chunks=2, samples=3, max_rows=3, max_length=MAX_CONTEXT)
    assert sizes.padded(size) == MixedSize(2, 8, MAX_CHUNKS, 2 + MAX_CHUNKS, 8, MAX_CONTEXT)
    assert (sizes.padded(replace(size, singles=0)).singles, sizes.padded(replace(size, singles=4)).singles) == (0, 4)
    assert (sizes.padded(replace(size, rows=4)).rows, sizes.padded(replace(size, rows=9)).rows) == (4, CHUNK_TOKENS)
    assert sizes.padded(replace(size, chunks=MAX_CHUNKS)) == sizes.padded(size)
    assert sizes.padded(sizes.padded(size)) == sizes.padded(size)
    for large in (
        replace(size, singles=5),
        replace(size, rows=CHUNK_TOKENS + 1),
        replace(size, chunks=MAX_CHUNKS + 1),
        replace(size, rows=0, chunks=0),
        replace(size, max_length=MAX_CONTEXT + 1),
    ):
        assert sizes.padded(large) is large
    assert MixedSizes.none().padded(size) is size


def test_padding_of_an_expensive_model_is_bounded() -> None:
    sizes = some_sizes(flop_per_row=MAX_PADDING_FLOP / 3)
    size = MixedSize(singles=1, rows=2, chunks=1, samples=2, max_rows=2, max_length=5)
    assert sizes.padded(size).num_rows == 2 + 4
    more = replace(size, rows=1)
    assert sizes.padded(more) is more
    assert sizes.padded(replace(more, singles=2)).num_rows == 2 + 4


@pytest.mark.parametrize(
    ("keys", "rows"),
    [
        ({}, [10, 8, 4]),
        ({"chunk_tokens": 3}, [3]),
        ({"chunk_tokens": 8}, [8, 4]),
        ({"chunk_tokens": 16}, [16, 8, 4]),
        ({"chunk_tokens": 100}, [16, 8, 4]),
        ({"flop_per_row": MAX_GRAPH_FLOP / 9}, [8, 4]),
        ({"flop_per_row": MAX_GRAPH_FLOP / 3}, []),
    ],
)
def test_graphs_are_made_for_few_sizes_the_largest_first(keys: dict[str, float], rows: list[int]) -> None:
    """None was made for the most rows there are where a step has room for exactly these."""
    found = [(size.rows, size.singles) for size in some_sizes(**keys).all()]
    assert found == [(own, singles) for own in rows for singles in (4, 2, 0)]
    assert MixedSizes.none().all() == []


def test_a_short_step_without_a_graph_takes_the_host_longer() -> None:
    sizes = some_sizes(flop_per_row=MAX_GRAPH_FLOP / 10)
    exact = MixedSize(singles=2, rows=4, chunks=2, samples=3, max_rows=3, max_length=MAX_CONTEXT)
    assert not sizes.is_host_bound(sizes.padded(exact))
    for other in (replace(exact, chunks=MAX_CHUNKS + 1), replace(exact, max_length=MAX_CONTEXT + 1)):
        assert sizes.padded(other) is other
        assert sizes.is_host_bound(other)
        assert sizes.is_host_bound(replace(other, rows=8))
        assert not sizes.is_host_bound(replace(other, rows=9))
    assert MixedSizes.none().is_host_bound(replace(exact, rows=16))
    assert not MixedSizes.none().is_host_bound(replace(exact, rows=17))


@pytest.mark.parametrize(
    ("most", "rows_of_padding", "expected"),
    [
        (256, 192, [64, 256]),
        (256, 191, [64, 128, 192, 256]),
        (300, 100, [64, 128, 192, 256, 300]),
        (64, 1, [64]),
        (10, 1, [12]),
    ],
)
def test_there_are_as_many_sizes_of_decodes_as_padding_may_not_skip(
    most: int, rows_of_padding: int, expected: list[int]
) -> None:
    assert singles_of(most, MAX_PADDING_FLOP / rows_of_padding) == expected
