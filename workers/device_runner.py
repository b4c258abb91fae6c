"""The host side of an accelerator: turns plans into what changed on the device, and what comes back into tokens.

A step of sequences that go on costs a few list comprehensions, and no loop over what each of them is. Decides nothing
and computes nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.device import Device, DeviceResult, DeviceStep, DeviceTicket, Ints
from workers.device_slots import Slots
from workers.plan import Chunk, StepOutput, StepPlan
from workers.sequence import Sequence
from workers.types import TokenLogprobs


class DeviceRunner:
    """`device` is told of blocks of `block_size` tokens. Its slots are given to the sequences of a plan, if need be in
    place of those that were in no plan for the longest time; twice as many as run at once are enough for steps of which
    one is in flight."""

    lag = 1
    verifies_drafts = False

    def __init__(self, device: Device, block_size: int) -> None:
        self._device = device
        self._block_size = block_size
        self._slots = Slots(device.num_slots)
        self._graph_sizes = device.graph_sizes
        self.fatal_errors = device.fatal_errors
        self._room = _Room.sized(64)
        self._last: _Decode | None = None
        """The last step, if it was a decode step."""

    @property
    def prefill_interval(self) -> int:
        """See `Device`."""
        return self._device.prefill_interval

    def launch(self, plan: StepPlan) -> RunnerTicket:
        """Begin to compute `plan`. There are no adapters here: a sequence that has one gets an error for a token."""
        sequences, starts, counts, samples, _ = zip(*plan.chunks, strict=True)
        last = self._last
        if last is not None and last.goes_on(sequences, starts, samples, counts) and not plan.copies:
            step = self._next(plan, last)
            self._last = _Decode(sequences, starts, samples, counts, step)
            return RunnerTicket(plan, self._device.launch(step), True, {})
        newcomers = self._slots.take(sequences, plan.number)
        errors: dict[int, Exception] = {}
        if newcomers:
            names = ((i, sequence.adapter) for i, sequence in enumerate(sequences))
            errors = {i: LookupError(f"no adapter {name!r} is loaded") for i, name in names if name}
        is_decode = max(counts) == 1 and all(samples)
        num_chunks = len(sequences)
        num_padded = self._padded(num_chunks) if is_decode else num_chunks
        room = self._room = self._room.holding(num_padded)
        room.slots[:num_chunks] = self._slots.numbers
        room.slots[num_chunks:num_padded] = self._device.num_slots
        room.starts[:num_chunks] = starts
        room.starts[num_chunks:num_padded] = 0
        room.counts[:num_chunks] = counts
        room.counts[num_chunks:num_padded] = 1
        room.samples[:num_chunks] = samples
        step = DeviceStep(
            slots=room.slots[:num_padded],
            starts=room.starts[:num_padded],
            counts=room.counts[:num_padded],
            num_chunks=num_chunks,
            is_decode=is_decode,
            goes_on=False,
            samples=room.samples[:num_chunks],
            newcomers=newcomers,
            tables=self._slots.table_writes(sequences, range(num_chunks), self._copied(plan)),
            copies=plan.copies,
            num_logprobs=self._slots.num_logprobs(),
            allowed=self._allowed(plan.chunks),
        )
        self._last = _Decode(sequences, starts, samples, counts, step) if is_decode else None
        return RunnerTicket(plan, self._device.launch(step), is_decode, errors)

    def close(self) -> None:
        self._device.close()

    def _padded(self, num_rows: int) -> int:
        """Return the size of the graph that computes so many rows."""
        i = bisect_left(self._graph_sizes, num_rows)
        return self._graph_sizes[i] if i < len(self._graph_sizes) else num_rows

    def _next(self, plan: StepPlan, last: _Decode) -> DeviceStep:
        """Return the step after `last` of the same sequences: only where a block begins has a table changed."""
        step = last.step
        starts = step.starts[: step.num_chunks]
        starts += 1
        self._slots.touch(plan.number)
        begun = np.flatnonzero(starts % self._block_size == 0).tolist()
        return DeviceStep(
            slots=step.slots,
            starts=step.starts,
            counts=step.counts,
            num_chunks=step.num_chunks,
            is_decode=True,
            goes_on=True,
            samples=step.samples,
            tables=self._slots.table_writes(last.sequences, begun, []),
            num_logprobs=step.num_logprobs,
            allowed=self._allowed(plan.chunks),
        )

    def _copied(self, plan: StepPlan) -> list[tuple[int, int]]:
        """Return which chunks write to a copy of a block, and which of theirs it is: the first that they write to."""
        targets = {target for _, target in plan.copies}
        places = [(i, chunk.start // self._block_size) for i, chunk in enumerate(plan.chunks)] if targets else []
        return [(i, place) for i, place in places if plan.chunks[i].sequence.block_table[place] in targets]

    def _allowed(self, chunks: Seq[Chunk]) -> dict[int, Ints]:
        """Return what constraints allow next; a sequence that has one has no token in flight."""
        if not self._slots.has_constraints:
            return {}
        return {
            i: np.array(chunk.sequence.constraint.mask(), dtype=np.int32)
            for i, chunk in enumerate(chunks)
            if chunk.samples and chunk.sequence.constraint is not None
        }


@dataclass(slots=True)
class RunnerTicket:
    plan: StepPlan
    _ticket: DeviceTicket
    _all_sample: bool
    _errors: dict[int, Exception]
    """By chunk, what was wrong before it was computed."""

    def output(self) -> StepOutput:
        """Wait for the step. A sequence whose logits are not finite is an error of its own."""
        result = self._ticket.wait()
        drawn: list[tuple[int, ...]] = list(zip(result.tokens.tolist()))
        places: Seq[int] = range(len(drawn))
        if not self._all_sample:
            places = [i for i, chunk in enumerate(self.plan.chunks) if chunk.samples]
            tokens: list[tuple[int, ...]] = [()] * len(self.plan.chunks)
            for i, token in zip(places, drawn, strict=True):
                tokens[i] = token
        else:
            tokens = drawn
        errors = dict(self._errors)
        if len(result.tokens) and result.tokens.min() < 0:
            for i in places:
                if tokens[i][0] < 0:
                    errors.setdefault(i, FloatingPointError("logits that are not finite, or that allow no token"))
        for i in errors:
            tokens[i] = ()
        logprobs = _logprobs(self.plan, places, tokens, result) if result.logprobs is not None else ()
        return StepOutput(tokens, logprobs, errors=errors)


def _logprobs(
    plan: StepPlan, places: Seq[int], tokens: Seq[tuple[int, ...]], result: DeviceResult
) -> list[tuple[TokenLogprobs, ...]]:
    """Return by chunk what `result` says of the tokens of those sequences that want to know."""
    assert result.logprobs is not None
    assert result.top_tokens is not None
    assert result.top_logprobs is not None
    found: list[tuple[TokenLogprobs, ...]] = [()] * len(plan.chunks)
    for row, i in enumerate(places):
        count = plan.chunks[i].sequence.num_logprobs
        if count is not None and tokens[i]:
            ids, values = result.top_tokens[row, :count].tolist(), result.top_logprobs[row, :count].tolist()
            found[i] = (TokenLogprobs(float(result.logprobs[row]), tuple(zip(ids, values, strict=True))),)
    return found


@dataclass(frozen=True, slots=True)
class _Decode:
    """A decode step: the columns of its chunks, and what the device was told."""

    sequences: tuple[Sequence, ...]
    starts: tuple[int, ...]
    samples: tuple[bool, ...]
    counts: tuple[int, ...]
    step: DeviceStep

    def goes_on(
        self,
        sequences: tuple[Sequence, ...],
        starts: tuple[int, ...],
        samples: tuple[bool, ...],
        counts: tuple[int, ...],
    ) -> bool:
        """Whether these are the columns of the next step of the same sequences.

        Their block tables need no comparing: they are the same lists, longer by the blocks that begin. A sequence keeps
        its blocks while a step of it is in flight. If it has lost them since, the plan that took them has somebody in
        it, who needed them, and not this sequence: it is no longer in the last step. And where a block is replaced by
        a copy, the copy is the plan's, and `launch` does not go on.
        """
        return (
            sequences == self.sequences
            and samples == self.samples
            and counts == self.counts
            and starts == tuple([start + 1 for start in self.starts])
        )


@dataclass(frozen=True, slots=True)
class _Room:
    """Buffers that steps share."""

    slots: Ints
    starts: Ints
    counts: Ints
    samples: npt.NDArray[np.bool_]

    @classmethod
    def sized(cls, size: int) -> _Room:
        slots, starts, counts = (np.zeros(size, dtype=np.int32) for _ in range(3))
        return cls(slots, starts, counts, np.zeros(size, dtype=np.bool_))

    def holding(self, size: int) -> _Room:
        """Return buffers for `size` chunks, these if they are large enough."""
        return self if size <= len(self.slots) else _Room.sized(2 * size)
