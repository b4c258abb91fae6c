"""vLLM's worker on a CPU, but for one thing: a seeded request may have a prompt that takes several steps.

vLLM draws a token in each of them, throws it away and sets the request's generator back by what that took. A CPU's
generator cannot be set back, which ends vLLM's engine ("CPU Generator does not use offset", 0.32). Here such a row
draws from the generator that all unseeded rows share, and its own one waits for the token that counts.
Imported by vLLM's processes alone, by its path (`on_cpu.WORKER`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_worker import CPUWorker


class SeededCpuWorker(CPUWorker):  # type: ignore[misc]  # vllm has no types here
    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        batch = getattr(self.model_runner, "input_batch", None)
        mask = getattr(self.model_runner, "discard_request_mask", None)
        if batch is None or mask is None or not batch.generators:
            return super().sample_tokens(*args, **kwargs)
        discarded = np.flatnonzero(mask.np[: batch.num_reqs]).tolist()
        waiting = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
        try:
            return super().sample_tokens(*args, **kwargs)
        finally:
            batch.generators.update(waiting)
