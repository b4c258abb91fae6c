"""Who has which slot of a device, and what the device was told of them.

A sequence gets a slot with its first chunk and keeps it until another needs it: one that was preempted finds its tokens
again. Knows no steps beyond their numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq

import numpy as np

from workers.device import Ints, Newcomer, TableWrite
from workers.sequence import Sequence


class Slots:
    """Which sequence has which slot, and which blocks the device knows to be in its table."""

    def __init__(self, num_slots: int) -> None:
        self._slots: dict[Sequence, int] = {}
        self._holders: list[Sequence | None] = [None] * num_slots
        self._tables: list[list[int]] = [[] for _ in range(num_slots)]
        """The block tables that the device was told of: the very lists, since a new list is a new table."""
        self._num_known = [0] * num_slots
        """So many of their blocks it was told of."""
        self._logprobs = np.full(num_slots, -1, dtype=np.int32)
        self._num_with_logprobs = 0
        self._used = np.zeros(num_slots, dtype=np.int64)
        """The number of the last step that a slot was part of."""
        self._num_constrained = 0
        self.numbers: list[int] = []
        """The slots of the last `take`."""

    @property
    def has_constraints(self) -> bool:
        return self._num_constrained > 0

    def take(self, sequences: Seq[Sequence], step: int) -> list[Newcomer]:
        """Find the slots of `sequences`, and give one to those that have none; return these."""
        found = list(map(self._slots.get, sequences))
        missing = [i for i, slot in enumerate(found) if slot is None]
        if not missing:
            self.numbers = found  # type: ignore[assignment]  # none is None
            self._used[self.numbers] = step
            return []
        self._used[[slot for slot in found if slot is not None]] = step
        free = np.argsort(self._used, kind="stable")[: len(missing)].tolist()
        assert len(free) == len(missing)
        assert self._used[free].max() < step, "more sequences than slots"
        for i, slot in zip(missing, free, strict=True):
            self._give(slot, sequences[i])
            found[i] = slot
        self._used[free] = step
        self.numbers = found  # type: ignore[assignment]
        return [_newcomer(slot, sequences[i]) for i, slot in zip(missing, free, strict=True)]

    def touch(self, step: int) -> None:
        """The slots of the last `take` are part of this `step`, too."""
        self._used[self.numbers] = step

    def table_writes(
        self, sequences: Seq[Sequence], looked_at: Iterable[int], replaced: Seq[tuple[int, int]]
    ) -> list[TableWrite]:
        """Return what has changed in the tables of `sequences`, whose slots are `numbers`, since the device was told;
        it is told now. `looked_at` are the places of those that may have grown or are others, `replaced` are (i, place)
        of blocks that are others in the same table."""
        known, num_known, numbers = self._tables, self._num_known, self.numbers
        writes = []
        changed = [
            i
            for i in looked_at
            if num_known[slot := numbers[i]] != len(table := sequences[i].block_table) or known[slot] is not table
        ]
        for i in changed:
            slot, table = numbers[i], sequences[i].block_table
            start = num_known[slot] if known[slot] is table and num_known[slot] <= len(table) else 0
            writes.append(TableWrite(slot, start, table[start:]))
            known[slot], num_known[slot] = table, len(table)
        writes += [TableWrite(numbers[i], place, [sequences[i].block_table[place]]) for i, place in replaced]
        return writes

    def num_logprobs(self) -> Ints | None:
        """Return how many log probabilities each slot of `numbers` is to have; None if none has any."""
        if not self._num_with_logprobs:
            return None
        wanted = self._logprobs[self.numbers]
        return wanted if wanted.max() >= 0 else None

    def _give(self, slot: int, sequence: Sequence) -> None:
        former = self._holders[slot]
        if former is not None:
            del self._slots[former]
            self._num_constrained -= former.constraint is not None
            self._num_with_logprobs -= former.num_logprobs is not None
        self._holders[slot] = sequence
        self._slots[sequence] = slot
        self._tables[slot], self._num_known[slot] = [], 0
        self._num_constrained += sequence.constraint is not None
        self._num_with_logprobs += sequence.num_logprobs is not None
        self._logprobs[slot] = -1 if sequence.num_logprobs is None else sequence.num_logprobs


def _newcomer(slot: int, sequence: Sequence) -> Newcomer:
    params, work = sequence.sampling, sequence.work
    return Newcomer(
        slot=slot,
        tokens=sequence.tokens,
        num_prompt_tokens=sequence.num_prompt_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=params.seed,
        logit_bias=params.logit_bias,
        banned=sequence.banned_at(sequence.num_prompt_tokens),
        banned_until=sequence.num_prompt_tokens + work.min_tokens,
    )
