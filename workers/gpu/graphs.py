"""Steps of some sizes as CUDA graphs: a step is one launch then, whatever it is made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """All graphs share the memory of what is between, so one at a time is replayed, and what it returned is there until
    the next."""

    def __init__(self, device: torch.device) -> None:
        self._has_graphs = device.type == "cuda"
        self._graphs: dict[Hashable, tuple[Any, torch.Tensor]] = {}
        self._pool: Any = None

    @torch.inference_mode()
    def capture(self, key: Hashable, compute: Callable[[], torch.Tensor]) -> None:
        """Make the graph of `compute`, which reads and writes the same memory each time. Larger ones first: the others
        find room in their memory."""
        if not self._has_graphs:
            return
        compute()  # compiles what is not compiled yet, which must not happen during a capture
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                logits = compute()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = graph.pool()
        self._graphs[key] = graph, logits

    def replay(self, key: Hashable) -> torch.Tensor | None:
        """Return what the `compute` of `key` would, by its graph; None if there is none."""
        found = self._graphs.get(key)
        if found is None:
            return None
        graph, logits = found
        graph.replay()
        return logits

    def clear(self) -> None:
        self._graphs.clear()
