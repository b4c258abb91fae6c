"""A step of each kind by small models whose layers have the sizes of real ones. Imports the kernels' modules."""

from __future__ import annotations

import torch

from load_tests.rigs import gpu_cases
from workers.gpu.drawing import Drawer
from workers.gpu.flash import Spans
from workers.gpu.layout import BlockCache, Rows, StepMemory
from workers.gpu.model import GpuForward, GpuModel
from workers.weights.shape import ModelShape, from_config

BLOCK_SIZE, NUM_BLOCKS, NUM_SLOTS = 16, 8, 260


class EmptyCheckpoint:
    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.bfloat16)

    stored = tensor


@torch.inference_mode()
def compute_steps() -> None:
    """Decode one, a few and many sequences, compute a prompt, and draw."""
    device = torch.device("cpu")
    for config in gpu_cases.CONFIGS.values():
        shape = from_config(config | {"num_hidden_layers": 1, "vocab_size": 1024})
        model = GpuModel(EmptyCheckpoint(shape), torch.bfloat16, device)  # type: ignore[arg-type]
        memory = StepMemory(
            num_slots=NUM_SLOTS, max_tokens=64, block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS, device=device
        )
        cache = BlockCache(
            num_layers=1, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim, dtype=torch.bfloat16, device=device,
        )  # fmt: skip
        forward, drawer = GpuForward(model, memory, cache, max_decodes=NUM_SLOTS), Drawer(NUM_SLOTS, memory, device)
        for count in (1, 2, 64, 256):
            rows = _rows(count)
            logits = forward.decode(rows, count)
            drawer.take_largest(logits, rows)
        ends = torch.tensor([0, 2], dtype=torch.int32)
        spans = Spans(_rows(2), memory.tables[:1], ends, ends[1:], 2, 2)
        forward.compute(_rows(2), 2, spans, torch.tensor([1]))
        drawer.draw(logits[:2], _rows(2), torch.zeros(2, 5, dtype=torch.float64), sorts=True)


def _rows(count: int) -> Rows:
    return Rows(torch.zeros(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32))
