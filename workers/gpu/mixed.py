"""Steps with chunks of prompts in them: what the device receives of one, and to which sizes it is padded for a graph.

    singles       rows of chunks of one row that lead: decodes, which attend as such
    rows          those of the chunks behind them, one chunk behind the other
    samples       rows behind which a token is drawn, wherever they are

A graph computes a fixed number of each. What a step has not is padding: rows at position 0 of the spare slot, chunks
without rows, tokens drawn for the spare slot.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from workers.device import DeviceStep, Ints
from workers.gpu.flash import HostSpans, Spans
from workers.gpu.layout import Rows, StepMemory
from workers.gpu.upload import aligned

MAX_CHUNKS = 32
"""Of a graph."""
MAX_CONTEXT = 4096
"""Tokens of a chunk and before it, in a graph: it cannot know how long a context will be, and kernels share work out by
what it may be at most."""
MAX_GRAPH_FLOP = 8e12
"""Steps with more arithmetic take a GPU longer than the host takes to launch them operator by operator: no graphs."""
MAX_PADDING_FLOP = 1e12
"""What padding may cost."""
FEW_SINGLES = 64
_ROWS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


@dataclass(frozen=True, slots=True)
class MixedSize:
    singles: int
    rows: int
    chunks: int
    samples: int
    max_rows: int
    """Of a chunk."""
    max_length: int
    """Tokens that a row of a chunk attends to, its own included."""

    @property
    def num_rows(self) -> int:
        return self.singles + self.rows

    def places(self) -> list[slice]:
        """Return where in the received numbers each part that `arrange` returns lies."""
        lengths = (
            self.num_rows, self.num_rows, self.samples, self.samples, self.samples, self.rows, self.rows, self.chunks,
            self.chunks + 1, self.chunks,
        )  # fmt: skip
        places, first = [], 0
        for length in lengths:
            places.append(slice(first, first + length))
            first = aligned(first + length)
        return places


@dataclass(frozen=True, slots=True)
class MixedRows:
    """A step with chunks, as the device received it."""

    all: Rows
    sampling: torch.Tensor
    """[samples]: which of them a token is drawn behind."""
    own: Rows
    """These."""
    spans: Spans | None

    @classmethod
    def of(cls, size: MixedSize, received: torch.Tensor, memory: StepMemory, host: HostSpans | None) -> MixedRows:
        """Make them of `received`, which has the parts that `arrange` returned with `size`."""
        slots, positions, sampling, own_slots, own_positions, *chunks = (received[place] for place in size.places())
        spans = None
        if size.chunks:
            chunk_row_slots, chunk_positions, chunk_slots, ends, lengths = chunks
            num_blocks = -(-size.max_length // memory.block_size)
            tables = memory.tables[:, :num_blocks].index_select(0, chunk_slots)
            rows = Rows(chunk_row_slots, chunk_positions)
            spans = Spans(rows, tables, ends, lengths, size.max_rows, size.max_length, host)
        return cls(Rows(slots, positions), sampling, Rows(own_slots, own_positions), spans)


class MixedSizes:
    """The sizes that graphs are made for: those of `singles`, in the order of their number, by those of `rows`. A row
    costs `flop_per_row`."""

    def __init__(self, singles: Sequence[int], *, chunk_tokens: int, max_context: int, flop_per_row: float) -> None:
        self._flop_per_row = flop_per_row
        self._singles = [0, *singles] if singles else []
        most = min(chunk_tokens, _ROWS[-1], MAX_GRAPH_FLOP / flop_per_row)
        self._rows = sorted({rows for rows in (*_ROWS, chunk_tokens) if rows <= most})
        self._max_context = min(max_context, MAX_CONTEXT)
        self._max_padding = MAX_PADDING_FLOP / flop_per_row
        self._sizes = frozenset(self.all())

    @classmethod
    def none(cls) -> MixedSizes:
        return cls((), chunk_tokens=0, max_context=0, flop_per_row=1.0)

    def all(self) -> list[MixedSize]:
        """Return them, the largest first."""
        return [self._size(singles, rows) for rows in self._rows[::-1] for singles in self._singles[::-1]]

    def padded(self, size: MixedSize) -> MixedSize:
        """Return the size to which a step of `size` is padded: itself if there is no graph for it."""
        i, k = bisect_left(self._singles, size.singles), bisect_left(self._rows, size.rows)
        if i == len(self._singles) or k == len(self._rows) or not 0 < size.chunks <= MAX_CHUNKS:
            return size
        found = self._size(self._singles[i], self._rows[k])
        fits = size.max_length <= self._max_context and found.num_rows - size.num_rows <= self._max_padding
        return found if fits else size

    def is_host_bound(self, size: MixedSize) -> bool:
        """Say whether a GPU computes a step of `size` faster than the host launches it: a short one without a graph."""
        is_short = size.rows <= _ROWS[-1] and size.num_rows * self._flop_per_row <= MAX_GRAPH_FLOP
        return is_short and size not in self._sizes

    def _size(self, singles: int, rows: int) -> MixedSize:
        return MixedSize(singles, rows, MAX_CHUNKS, singles + MAX_CHUNKS, rows, self._max_context)


def singles_of(most: int, flop_per_row: float) -> list[int]:
    """Return how many decodes graphs of steps with chunks are made for, of up to `most`: few and all, or as many sizes
    between them as padding may not skip."""
    step = FEW_SINGLES if (most - FEW_SINGLES) * flop_per_row > MAX_PADDING_FLOP else most
    return sorted({aligned(min(count, most)) for count in (FEW_SINGLES, *range(step, most, step), most)})


def most_samples(graph_sizes: Sequence[int]) -> int:
    """Return behind how many rows a graph draws tokens at most, where there are graphs of as many decodes as
    `graph_sizes` say, and of such beside chunks."""
    return aligned(max(graph_sizes)) + MAX_CHUNKS if graph_sizes else 0


def arrange(step: DeviceStep, sizes: MixedSizes, spare_slot: int) -> tuple[MixedSize, list[Ints], HostSpans]:
    """Return the size of `step`, padded if it can be, what the device must receive of it, and of that what it is
    without padding."""
    counts, lengths, samples = step.counts, step.starts + step.counts, step.samples
    is_long = counts > 1
    single = int(is_long.argmax()) if is_long.any() else len(counts)
    ends = np.cumsum(counts, dtype=np.int32)
    exact = MixedSize(
        singles=single,
        rows=int(ends[-1]) - single,
        chunks=len(counts) - single,
        samples=int(samples.sum()),
        max_rows=int(counts.max()),
        max_length=int(lengths[single:].max()) if single < len(counts) else 0,
    )
    size = sizes.padded(exact)
    slots = np.repeat(step.slots, counts)
    positions = np.arange(len(slots), dtype=np.int32) - np.repeat(ends - lengths, counts)
    last = ends[samples] - 1
    last[last >= single] += size.singles - single
    chunk_ends = np.concatenate(([0], ends[single:] - single))
    host = chunk_ends.tolist(), lengths[single:].tolist()
    singles, rows = (slots[:single], positions[:single]), (slots[single:], positions[single:])
    padded_rows = (_filled(rows[0], size.rows, spare_slot), _filled(rows[1], size.rows, 0))
    parts = [
        np.concatenate((_filled(singles[0], size.singles, spare_slot), padded_rows[0])),
        np.concatenate((_filled(singles[1], size.singles, 0), padded_rows[1])),
        _filled(last, size.samples, 0),
        _filled(step.slots[samples], size.samples, spare_slot),
        _filled(lengths[samples] - 1, size.samples, 0),
        *padded_rows,
        _filled(step.slots[single:], size.chunks, spare_slot),
        _filled(chunk_ends, size.chunks + 1, int(chunk_ends[-1])),
        _filled(lengths[single:], size.chunks, 0),
    ]
    return size, parts, host


def padding(size: MixedSize, spare_slot: int) -> list[Ints]:
    """Return the parts of a step of `size` that is nothing but padding."""
    empty = np.zeros(0, dtype=np.int32)
    fills = (spare_slot, 0, 0, spare_slot, 0, spare_slot, 0, spare_slot, 0, 0)
    lengths = [place.stop - place.start for place in size.places()]
    return [_filled(empty, length, fill) for length, fill in zip(lengths, fills, strict=True)]


def _filled(part: npt.NDArray[np.integer], size: int, fill: int) -> Ints:
    """Return `part` with as many numbers behind it as are missing."""
    if len(part) == size:
        return part.astype(np.int32, copy=False)
    filled = np.full(size, fill, dtype=np.int32)
    filled[: len(part)] = part
    return filled
