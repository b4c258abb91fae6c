"""Which rows of a step belong to which sequence, and where their keys and values lie: a `StepPlan` as tensors.

    rows      d0 d1 d2 | p0 p0 p0 p0 | p1 p1 ...      decodes (chunks of one row) first, then the longer chunks
    position  of the row's token in its sequence
    block     and offset: where its key and value are written

A chunk's draft makes rows like its tokens, behind them. Block tables are padded with the table's own first block, which
is masked: padding never reads another sequence.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch

from workers.plan import Chunk


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one token each whose contexts are of similar length."""

    rows: torch.Tensor
    """[n] row numbers."""
    tables: torch.Tensor
    """[n, blocks]."""
    lengths: torch.Tensor
    """[n] tokens that each row attends to, its own included."""


@dataclass(frozen=True, slots=True)
class Span:
    """The rows ``[first, first + num_rows)`` of one sequence, which follow `start` tokens in its blocks."""

    first: int
    num_rows: int
    start: int
    table: torch.Tensor
    """[blocks], covering start + num_rows tokens."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    tokens: torch.Tensor
    """[rows] token ids."""
    positions: torch.Tensor
    """[rows]."""
    blocks: torch.Tensor
    """[rows] block to which the row's key and value are written."""
    offsets: torch.Tensor
    """[rows] place in that block."""
    begun_blocks: torch.Tensor
    """[n] blocks whose first place is written in this step and whose last is not."""
    decodes: tuple[DecodeGroup, ...]
    spans: tuple[Span, ...]
    sampling_chunks: tuple[int, ...]
    """Indices into the plan's chunks that sample, in the order of the plan."""
    sampling_rows: torch.Tensor
    """For each of these chunks the row of its last token, and then those of its draft."""
    adapter_rows: dict[str, torch.Tensor]
    """By adapter, the rows of the sequences that use it."""


def lay_out(chunks: Seq[Chunk], block_size: int) -> StepLayout:
    """Turn chunks into tensors. Every chunk has tokens, and blocks for all of them."""
    order = sorted(range(len(chunks)), key=lambda i: chunks[i].num_rows > 1)
    first_row = np.zeros(len(chunks), dtype=np.int64)
    tokens: list[int] = []
    for i in order:
        chunk = chunks[i]
        first_row[i] = len(tokens)
        tokens += chunk.sequence.tokens[chunk.start : chunk.start + chunk.num_tokens]
        tokens += chunk.draft
    counts = np.fromiter((chunks[i].num_rows for i in order), np.int64, len(order))
    starts = np.fromiter((chunks[i].start for i in order), np.int64, len(order))
    tables = [_used_blocks(chunks[i], block_size) for i in order]
    assert len(tokens) == counts.sum(), "a chunk reaches beyond the tokens that its sequence has"

    positions = np.arange(len(tokens)) - np.repeat(np.cumsum(counts) - counts - starts, counts)
    table_starts = np.cumsum([0, *(len(table) for table in tables)])[:-1]
    blocks = np.concatenate(tables)[np.repeat(table_starts, counts) + positions // block_size]
    ends = starts + counts
    last_blocks = np.array([table[-1] for table in tables])
    is_begun = (ends % block_size > 0) & (ends // block_size * block_size >= starts)
    num_decodes = int((counts == 1).sum())
    sampling = tuple(i for i, chunk in enumerate(chunks) if chunk.samples)
    sampling_rows: list[int] = []
    for i in sampling:
        end = int(first_row[i]) + chunks[i].num_rows
        sampling_rows += range(end - len(chunks[i].draft) - 1, end)
    return StepLayout(
        tokens=torch.tensor(tokens),
        positions=torch.from_numpy(positions),
        blocks=torch.from_numpy(blocks),
        offsets=torch.from_numpy(positions % block_size),
        begun_blocks=torch.from_numpy(last_blocks[is_begun]),
        decodes=_group_decodes(tables[:num_decodes], starts[:num_decodes] + 1),
        spans=tuple(
            Span(int(first_row[i]), chunks[i].num_rows, chunks[i].start, torch.from_numpy(table))
            for i, table in zip(order[num_decodes:], tables[num_decodes:], strict=True)
        ),
        sampling_chunks=sampling,
        sampling_rows=torch.tensor(sampling_rows, dtype=torch.int64),
        adapter_rows=_adapter_rows(chunks, first_row),
    )


def _used_blocks(chunk: Chunk, block_size: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    used = -(-(chunk.start + chunk.num_rows) // block_size)
    table = np.array(chunk.sequence.block_table[:used], dtype=np.int64)
    assert len(table) == used, "a chunk has fewer blocks than tokens"
    return table


def _group_decodes(tables: Seq[np.ndarray], lengths: np.ndarray) -> tuple[DecodeGroup, ...]:
    """Group by number of blocks to the next power of two (at least 8): padding less than doubles the reading."""
    sizes = [max(8, 1 << (len(table) - 1).bit_length()) for table in tables]
    groups = []
    for size in sorted(set(sizes)):
        rows = [row for row, row_size in enumerate(sizes) if row_size == size]
        width = max(len(tables[row]) for row in rows)
        padded = np.stack([np.pad(tables[row], (0, width - len(tables[row])), mode="wrap") for row in rows])
        groups.append(DecodeGroup(torch.tensor(rows), torch.from_numpy(padded), torch.from_numpy(lengths[rows])))
    return tuple(groups)


def _adapter_rows(chunks: Seq[Chunk], first_row: np.ndarray) -> dict[str, torch.Tensor]:
    rows: dict[str, list[int]] = {}
    for i, chunk in enumerate(chunks):
        if chunk.sequence.adapter:
            rows.setdefault(chunk.sequence.adapter, []).extend(range(first_row[i], first_row[i] + chunk.num_rows))
    return {name: torch.tensor(numbers) for name, numbers in rows.items()}
