"""What the host tells the device for a step, in one piece of pinned memory and one copy.

part 0 | part 1 | ... | cells as int64 | values      then ``memory[cells] = values``, in one operator

Each begins at a multiple of 16 bytes: a kernel is compiled once for such addresses, and once more for others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from workers.device import Ints


class Upload:
    """One step at a time: `add` its parts, `write` to cells, `send`. The memory must not be written again before the
    device has got it."""

    def __init__(self, size: int, *, is_pinned: bool) -> None:
        """It has room for `size` numbers; a step whose writes need more pays for its own memory."""
        self._is_pinned = is_pinned
        self._room = torch.zeros(size, dtype=torch.int32, pin_memory=is_pinned)
        self._numbers: Ints = self._room.numpy()
        self._used = 0
        self._writes: list[tuple[int, Ints]] = []

    def add(self, part: npt.NDArray[np.integer]) -> slice:
        """Send `part` too; return where it will be."""
        place = slice(self._used, self._used + len(part))
        self._numbers[place] = part
        self._used = aligned(place.stop)
        return place

    def write(self, cell: int, values: Sequence[int]) -> None:
        """``memory[cell : cell + len(values)] = values``."""
        self._writes.append((cell, np.array(values, dtype=np.int32)))

    def send(self, received: torch.Tensor, memory: torch.Tensor) -> None:
        """Copy all parts to the beginning of `received`, write to `memory`, and begin anew."""
        used, writes = self._used, self._writes
        self._used, self._writes = 0, []
        if not writes:
            received[:used].copy_(self._room[:used], non_blocking=True)
            return
        values = writes[0][1] if len(writes) == 1 else np.concatenate([own for _, own in writes])
        count = len(values)
        first, middle = used, aligned(used + 2 * count)
        end = middle + count
        if end > len(self._numbers):
            received[:used].copy_(self._room[:used], non_blocking=True)
            cells = self._own(_cells(writes, np.empty(count, dtype=np.int64)), memory)
            memory.index_copy_(0, cells, self._own(values, memory))
            return
        _cells(writes, self._numbers[first : first + 2 * count].view(np.int64))
        self._numbers[middle:end] = values
        received[:end].copy_(self._room[:end], non_blocking=True)
        cells = received[first : first + 2 * count].view(torch.int64)
        memory.index_copy_(0, cells, received[middle:end])

    def _own(self, array: npt.NDArray[np.integer], memory: torch.Tensor) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return (tensor.pin_memory() if self._is_pinned else tensor).to(memory.device, non_blocking=True)


def aligned(size: int) -> int:
    """Return the least multiple of 16 bytes that has room for `size` numbers."""
    return -(-size // 4) * 4


def _cells(writes: Sequence[tuple[int, Ints]], out: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Fill `out` with the cells of `writes`, one after the other."""
    if len(writes) == sum(len(own) for _, own in writes):
        out[:] = [cell for cell, _ in writes]
        return out
    first = 0
    for cell, own in writes:
        out[first : first + len(own)] = np.arange(cell, cell + len(own))
        first += len(own)
    return out
