"""A `workers.device.Device` on a GPU: applies what changed, computes a step, draws, sends tokens back. Needs triton.

    upload    one copy from pinned memory: rows, and (cell, value) of all that the host has to say
    compute   a decode step is the replay of a graph, and so is one with chunks of prompts, if it is not large
    draw      in the graph, or again behind it where a row is not simply the largest logit's
    download  tokens to pinned memory, and an event

Everything is in one stream, so steps follow each other and `launch` waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from workers.device import DeviceResult, DeviceStep, Ints
from workers.gpu.drawing import Drawer
from workers.gpu.flash import HostSpans, Spans
from workers.gpu.graphs import Graphs
from workers.gpu.layout import BlockCache, Rows, StepMemory
from workers.gpu.mixed import MixedRows, MixedSize, MixedSizes, arrange, most_samples, padding, singles_of
from workers.gpu.model import GpuForward
from workers.gpu.parameters import Likeliest, Sampling
from workers.gpu.upload import Upload, aligned

NUM_TICKETS = 4
NUM_COMPILERS = 4
PACE = 4
"""The interval of steps with prompts after one that took the host longer than the GPU. On an H200 a step of 256
sequences of a small model takes 3.4 ms as a graph, and with a short prompt in it 7 ms without: with a newcomer in each
step it answered 35,700 tokens/s, half of what it could."""


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
        max_chunks = max(self.num_slots, most_samples(graph_sizes))
        self._drawer = Drawer(max_chunks, memory, device)
        self._sampling = Sampling(memory, self._drawer)
        max_rows = max(chunk_tokens, max_chunks)
        self._received = torch.zeros(4 * max_rows + 8 * max_chunks + (1 << 20), dtype=torch.int32, device=device)
        self._tickets = [_Ticket.new(len(self._received), max_chunks, device) for _ in range(NUM_TICKETS)]
        self._num_launched = 0
        self._mixed_sizes = MixedSizes.none()
        if graph_sizes and forward.is_capturable:
            singles = singles_of(max(graph_sizes), forward.flop_per_row)
            self._mixed_sizes = MixedSizes(
                singles, chunk_tokens=chunk_tokens, max_context=memory.max_tokens, flop_per_row=forward.flop_per_row
            )
        self.prefill_interval = 1
        self._graphs = Graphs(device)
        if device.type == "cuda":
            self._warm(forward)
            self._capture()

    @torch.inference_mode()
    def launch(self, step: DeviceStep) -> _Ticket:
        """Begin to compute `step`."""
        ticket = self._tickets[self._num_launched % NUM_TICKETS]
        ticket.finish()  # of a step long read, unless nobody waited for it
        self._num_launched += 1
        self._sampling.take(step.newcomers)
        count = int(step.samples.sum())
        launch = self._launch_decode if step.is_decode else self._launch_mixed
        rows, logits = launch(step, ticket.upload)
        likeliest = None
        if count and self._sampling.is_needed(step):
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

        def decode(count: int) -> None:
            self._drawer.take_largest(forward.decode(rows(count), count), rows(count))

        def compute() -> None:
            one, zero = rows(1), torch.zeros(1, dtype=torch.int64, device=device)
            ends = torch.tensor([0, 1], dtype=torch.int32, device=device)
            table, length = self._memory.tables[spare:, :1].contiguous(), ends[1:].clone()
            spans = Spans(one, table, ends, length, 1, 1, ([0, 1], [1]))
            forward.compute(one, 1, spans, zero)

        def draw() -> None:
            logits = torch.zeros(1, forward.vocab_size, device=device)
            self._drawer.draw(logits, rows(1), torch.zeros(1, 5, dtype=torch.float64, device=device), sorts=True)

        steps: list[Callable[[], None]] = [draw, compute]
        steps += [partial(decode, count) for count in forward.sizes_of_kinds(self.num_slots)]
        with ThreadPoolExecutor(NUM_COMPILERS) as compilers:
            for done in [compilers.submit(torch.inference_mode()(step)) for step in steps]:
                done.result()

    def _capture(self) -> None:
        """Make all graphs, of steps that are nothing but padding."""
        spare = self._memory.spare_slot
        for size in self._mixed_sizes.all():
            self._receive(padding(size, spare))
            self._graphs.capture(size, partial(self._mixed, size, None))
        for num_rows in sorted(self.graph_sizes, reverse=True):
            rows = self._received_rows(num_rows)
            rows.slots.fill_(spare)
            rows.positions.zero_()
            self._graphs.capture(num_rows, partial(self._decode, num_rows))

    def _decode(self, size: int) -> torch.Tensor:
        """Compute the decode step whose slots and positions were received; return its logits."""
        assert self._forward is not None
        rows = self._received_rows(size)
        logits = self._forward.decode(rows, size)
        self._drawer.take_largest(logits, rows)
        return logits

    def _launch_decode(self, step: DeviceStep, upload: Upload) -> tuple[Rows, torch.Tensor]:
        size = len(step.slots)
        self.prefill_interval = 1
        upload.add(step.slots)
        upload.add(step.starts)
        self._apply(step, upload)
        logits = self._graphs.replay(size)
        return self._received_rows(size), self._decode(size) if logits is None else logits

    def _received_rows(self, size: int) -> Rows:
        """Return the rows of a decode step of `size`, as they were received."""
        first = aligned(size)
        return Rows(self._received[:size], self._received[first : first + size])

    def _mixed(self, size: MixedSize, host: HostSpans | None) -> torch.Tensor:
        """Compute the step with chunks that was received; return the logits of rows that sample."""
        assert self._forward is not None
        rows = MixedRows.of(size, self._received, self._memory, host)
        logits = self._forward.compute(rows.all, size.num_rows, rows.spans, rows.sampling)
        if size.samples:
            self._drawer.take_largest(logits, rows.own)
        return logits

    def _launch_mixed(self, step: DeviceStep, upload: Upload) -> tuple[Rows, torch.Tensor]:
        """Compute chunks of any length; return the rows of those that sample, and their logits, padding behind them."""
        size, parts, host = arrange(step, self._mixed_sizes, self._memory.spare_slot)
        for part in parts:
            upload.add(part)
        self._apply(step, upload)
        self.prefill_interval = PACE if self._mixed_sizes.is_host_bound(size) else 1
        logits = self._graphs.replay(size)
        if logits is None:
            logits = self._mixed(size, host)
        _, _, _, slots, positions, *_ = size.places()
        return Rows(self._received[slots], self._received[positions]), logits

    def _receive(self, parts: list[Ints]) -> None:
        upload = self._tickets[0].upload
        for part in parts:
            upload.add(part)
        upload.send(self._received, self._memory.cells)
        torch.cuda.synchronize()

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
