"""What the host says to a device: parts that begin where kernels like it, and cells of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.gpu.layout import BlockCache, StepMemory
from workers.gpu.upload import Upload, aligned


@pytest.mark.parametrize("size", [200, 30], ids=["in one copy", "too much for it"])
def test_parts_and_writes_arrive(size: int) -> None:
    upload, received = Upload(size, is_pinned=False), torch.full((200,), -1, dtype=torch.int32)
    memory = torch.zeros(50, dtype=torch.int32)
    for number in range(2):  # and nothing of a step is left for the next
        places = [upload.add(np.arange(count) + number) for count in (3, 1, 5)]
        upload.write(7, [1, 2, 3])
        upload.write(40, [9])
        upload.write(20, list(range(4 + number)))
        upload.send(received, memory)
        assert [received[place].tolist() for place in places] == [
            [number, 1 + number, 2 + number],
            [number],
            [i + number for i in range(5)],
        ]
        assert all(place.start % 4 == 0 for place in places)
    assert memory[7:11].tolist() == [1, 2, 3, 0]
    assert memory[20:26].tolist() == [0, 1, 2, 3, 4, 0]
    assert memory[40] == 9
    assert int((memory != 0).sum()) == 8


def test_single_cells_and_no_writes() -> None:
    upload, received, memory = (
        Upload(40, is_pinned=False),
        torch.zeros(40, dtype=torch.int32),
        torch.zeros(9, dtype=torch.int32),
    )
    upload.add(np.array([4, 5]))
    upload.send(received, memory)
    assert received[:2].tolist() == [4, 5]
    assert not memory.any()
    upload.write(3, [7])
    upload.write(8, [6])
    upload.send(received, memory)
    assert memory.tolist() == [0, 0, 0, 7, 0, 0, 0, 0, 6]


def test_aligned() -> None:
    assert [aligned(size) for size in (0, 1, 4, 5)] == [0, 4, 4, 8]


def test_memory_names_its_cells_and_begins_with_the_spare_block() -> None:
    memory = StepMemory(num_slots=2, max_tokens=10, block_size=4, num_blocks=6, device=torch.device("cpu"))
    assert memory.max_blocks == 3  # one token more than a sequence has is drawn behind its last
    assert memory.tables.tolist() == [[6, 6, 6]] * 3
    memory.cells[memory.token_cell(1, 9)] = 5
    memory.cells[memory.table_cell(2, 1)] = 4
    assert memory.tokens[1, 9] == 5
    assert memory.tables[2].tolist() == [6, 4, 6]


def test_copies_are_all_read_before_any_is_written() -> None:
    cache = BlockCache(
        num_layers=2, num_blocks=3, block_size=2, num_kv_heads=1, head_dim=4, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    cache.pool[:] = torch.arange(4.0)[None, None, :, None, None, None]
    cache.copy(torch.tensor([0, 1]), torch.tensor([1, 2]))
    keys, values = cache.layers[1]
    assert keys[:, 0, 0, 0].tolist() == values[:, 1, 0, 3].tolist() == [0.0, 0.0, 1.0, 3.0]
