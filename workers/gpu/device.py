"""A `workers.device.Device` on a GPU: applies what changed, computes a step, draws, sends tokens back. Needs triton.

    upload    one copy from pinned memory: rows, and (cell, value) of all that the host has to say
    compute   a decode step is the replay of a graph; others are computed operator by operator
    draw      in the graph, or again behind it where a row is not simply the largest logit's
    download  tokens to pinned memory, and an event

Everything is in one stream, so steps follow each other and `launch` waits for nothing.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from workers.device import DeviceResult, DeviceStep, Ints
from workers.gpu.drawing import Drawer
from workers.gpu.flash import Spans
from workers.gpu.graphs import Graphs
from workers.gpu.layout import BlockCache, Rows, StepMemory
from workers.gpu.model import GpuForward
from workers.gpu.parameters import Likeliest, Sampling
from workers.gpu.upload import Upload, aligned

NUM_TICKETS = 4
NUM_COMPILERS = 4


class GpuDevice:
    """Owns the buffers that steps pass through. `forward` computes over `memory` and `cache`."""

    fatal_errors = (torch.AcceleratorError,)
    """An error in a kernel ends the whole CUDA context of the process; memory that is short is another error."""

    def __init__(
        self, forward: GpuForward, memory: StepMemory, cache: BlockCache, *, chunk_tokens: int,
        graph_sizes: tuple[int, ...],
    ) -> None:  # fmt: skip
        self.num_slots = memory.spare_slot
        self.graph_sizes = graph_sizes
        self._forward: GpuForward | None = forward
        self._memory = memory
        self._cache = cache
        device = memory.cells.device
        max_chunks = max(self.num_slots, *graph_sizes, 1)
        self._drawer = Drawer(max_chunks, memory, device)
        self._sampling = Sampling(memory, self._drawer)
        max_rows = max(chunk_tokens, max_chunks)
        self._received = torch.zeros(4 * max_rows + 8 * max_chunks + (1 << 20), dtype=torch.int32, device=device)
        self._tickets = [_Ticket.new(len(self._received), max_chunks, device) for _ in range(NUM_TICKETS)]
        self._num_launched = 0
        self._graphs = Graphs(self._decode, device)
        if device.type == "cuda":
            self._warm(forward)
        for size in sorted(graph_sizes, reverse=True):
            rows = self._received_rows(size)
            rows.slots.fill_(memory.spare_slot)
            rows.positions.zero_()
            self._graphs.capture(size)

    @torch.inference_mode()
    def launch(self, step: DeviceStep) -> _Ticket:
        """Begin to compute `step`."""
        ticket = self._tickets[self._num_launched % NUM_TICKETS]
        ticket.finish()  # of a step long read, unless nobody waited for it
        self._num_launched += 1
        self._sampling.take(step.newcomers)
        count = int(step.samples.sum())
        logits: torch.Tensor | None
        if step.is_decode:
            rows, logits = self._launch_decode(step, ticket.upload)
        else:
            rows, logits = self._launch_mixed(step, ticket.upload, count)
        likeliest = None
        if logits is not None and self._sampling.is_needed(step):
            likeliest = self._sampling.apply(logits[:count], step, rows.first(count))
        ticket.send(self._drawer.drawn, count, likeliest)
        return ticket

    def close(self) -> None:
        """Give the memory back, that of weights with the model's last reference."""
        for ticket in self._tickets:
            ticket.finish()
        self._graphs.clear()
        self._forward = None

    def _warm(self, forward: GpuForward) -> None:
        """Compute a step of each kind with the spare slot, so that no request waits for a kernel to be compiled. Most
        of that time compilers are at work that need no lock of Python's."""
        device, spare = self._memory.cells.device, self._memory.spare_slot

        def rows(count: int) -> Rows:
            numbers = torch.tensor([[spare] * count, [0] * count], dtype=torch.int32, device=device)
            return Rows(numbers[0].clone(), numbers[1].clone())

        def decode_one() -> None:
            forward.decode(rows(1), 1)

        def decode() -> None:
            self._drawer.take_largest(forward.decode(rows(2), 2), rows(2))

        def compute() -> None:
            one, zero = rows(1), torch.zeros(1, dtype=torch.int64, device=device)
            ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
            table, length = self._memory.tables[spare:, :1].contiguous(), ends[1:].clone()
            spans = Spans(one, table, ends, length, [0, 1], [1], 1, 1)
            forward.compute(one, 1, spans, zero)

        def draw() -> None:
            logits = torch.zeros(1, forward.vocab_size, device=device)
            self._drawer.draw(logits, rows(1), torch.zeros(1, 5, dtype=torch.float64, device=device), sorts=True)

        with ThreadPoolExecutor(NUM_COMPILERS) as compilers:
            for done in [
                compilers.submit(torch.inference_mode()(step)) for step in (draw, compute, decode, decode_one)
            ]:
                done.result()

    def _decode(self, size: int) -> torch.Tensor:
        """Compute the decode step whose slots and positions were received; return its logits."""
        assert self._forward is not None
        rows = self._received_rows(size)
        logits = self._forward.decode(rows, size)
        self._drawer.take_largest(logits, rows)
        return logits

    def _launch_decode(self, step: DeviceStep, upload: Upload) -> tuple[Rows, torch.Tensor]:
        size = len(step.slots)
        upload.add(step.slots)
        upload.add(step.starts)
        self._apply(step, upload)
        return self._received_rows(size), self._graphs.compute(size)

    def _received_rows(self, size: int) -> Rows:
        """Return the rows of a decode step of `size`, as they were received."""
        first = aligned(size)
        return Rows(self._received[:size], self._received[first : first + size])

    def _launch_mixed(self, step: DeviceStep, upload: Upload, count: int) -> tuple[Rows, torch.Tensor | None]:
        """Compute chunks of any length; return the rows of those that sample, and their logits."""
        assert self._forward is not None
        slots, starts, counts, samples = step.slots, step.starts, step.counts, step.samples
        ends = np.cumsum(counts, dtype=np.int32)
        lengths, num_rows = starts + counts, int(ends[-1])
        positions = np.arange(num_rows, dtype=np.int32) - np.repeat(ends - lengths, counts)
        row_slots = np.repeat(slots, counts)
        is_long = counts > 1
        single = int(is_long.argmax()) if is_long.any() else len(counts)
        # Chunks of one row that lead are decodes and attend as such; their rows are as many as they are.
        parts = (
            row_slots, positions, ends[samples] - 1, slots[samples], lengths[samples] - 1, row_slots[single:],
            positions[single:], slots[single:], np.concatenate(([0], ends[single:] - single)), lengths[single:],
        )  # fmt: skip
        received = [upload.add(part) for part in parts]
        self._apply(step, upload)
        (all_slots, all_positions, last, own_slots, own_positions, *long) = (self._received[at] for at in received)
        spans = None
        if single < len(counts):
            long_slots, long_positions, chunk_slots, chunk_ends, chunk_lengths = long
            num_blocks = -(-step.max_context // self._memory.block_size)
            spans = Spans(
                rows=Rows(long_slots, long_positions),
                tables=self._memory.tables[:, :num_blocks].index_select(0, chunk_slots),
                ends=chunk_ends,
                lengths=chunk_lengths,
                host_ends=[0, *(ends[single:] - single).tolist()],
                host_lengths=lengths[single:].tolist(),
                max_rows=int(counts.max()),
                max_length=step.max_context,
            )
        rows = Rows(own_slots, own_positions)
        logits = self._forward.compute(Rows(all_slots, all_positions), num_rows, spans, last)
        if not count:
            return rows, None
        self._drawer.take_largest(logits, rows)
        return rows, logits

    def _apply(self, step: DeviceStep, upload: Upload) -> None:
        """Send what `upload` has, and apply what came since the last step."""
        memory = self._memory
        for newcomer in step.newcomers:
            upload.write(memory.token_cell(newcomer.slot, 0), newcomer.tokens)
        for write in step.tables:
            upload.write(memory.table_cell(write.slot, write.start), write.blocks)
        upload.send(self._received, memory.cells)
        if step.copies:
            pairs = torch.tensor(step.copies, dtype=torch.int64)
            sources, targets = (pairs if memory.cells.is_cpu else pairs.pin_memory()).to(
                memory.cells.device, non_blocking=True
            ).T  # fmt: skip
            self._cache.copy(sources, targets)


@dataclass(slots=True)
class _Ticket:
    """A launched step, and the pinned memory that it comes and goes through; used again and again."""

    upload: Upload
    _room: torch.Tensor
    _tokens: Ints
    _event: torch.cuda.Event | None
    _result: DeviceResult = field(default_factory=lambda: DeviceResult(np.zeros(0, dtype=np.int32)))

    @classmethod
    def new(cls, size: int, max_chunks: int, device: torch.device) -> _Ticket:
        is_cuda = device.type == "cuda"
        room = torch.zeros(max_chunks, dtype=torch.int32, pin_memory=is_cuda)
        event = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]
        return cls(Upload(size, is_pinned=is_cuda), room, room.numpy(), event)

    def send(self, drawn: torch.Tensor, count: int, likeliest: Likeliest | None) -> None:
        """Have the device send what it drew, when it comes to it."""
        self._room[:count].copy_(drawn[:count], non_blocking=True)
        if likeliest is None:
            self._result = DeviceResult(self._tokens[:count])
        else:
            parts = (likeliest.drawn[:, 0], likeliest.tokens, likeliest.values)
            own, tokens, values = (self._fetched(part).numpy() for part in parts)
            self._result = DeviceResult(self._tokens[:count], own, tokens, values)
        if self._event is not None:
            self._event.record()

    def wait(self) -> DeviceResult:
        self.finish()
        return self._result

    def finish(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def _fetched(self, part: torch.Tensor) -> torch.Tensor:
        room = torch.empty(part.shape, dtype=part.dtype, pin_memory=self._event is not None)
        return room.copy_(part, non_blocking=True)
