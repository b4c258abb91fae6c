"""Decode steps of some sizes as CUDA graphs: a step is one launch then, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Graphs:
    """`compute(size)` reads and writes the same memory each time. All graphs share the memory of what is between, so
    one at a time is replayed, and what it returned is there until the next."""

    def __init__(self, compute: Callable[[int], torch.Tensor], device: torch.device) -> None:
        self._compute = compute
        self._has_graphs = device.type == "cuda"
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def capture(self, size: int) -> None:
        """Make the graph of `size` rows. Larger ones first: the others find room in their memory."""
        if not self._has_graphs:
            return
        self._compute(size)  # compiles what is not compiled yet, which must not happen during a capture
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = self._compute(size)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = graph.pool()
        self._graphs[size] = graph, logits

    def compute(self, size: int) -> torch.Tensor:
        """Return what ``compute(size)`` would, by its graph if there is one."""
        found = self._graphs.get(size)
        if found is None:
            return self._compute(size)
        graph, logits = found
        graph.replay()
        return logits

    def clear(self) -> None:
        self._graphs.clear()
