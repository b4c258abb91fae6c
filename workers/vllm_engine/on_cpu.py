"""What vLLM is started with on a CPU, where its own defaults cost much of the speed (load_tests/RESULTS.md).

- Its worker is ours, for the sake of seeds (`cpu_worker.py`).

- Its scheduler and its model share a process. By default they have one each, and each polls without a pause while it
  waits for the other, on the cores that the model computes on.
- A step takes 512 tokens and not 2,048: the first of many prompts that come together has its first token four times
  earlier, and a processor computes no faster with more.
- Its whole compiled models are written to disk, but cannot be read again (0.32: "no attribute 'finalize_loading'"), and
  are compiled at every start. Without that, the compiler's own cache is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

STEP_TOKENS: Final = 512
IN_ONE_PROCESS: Final = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
"""By its path: vLLM takes "uni" for "mp" on a CPU, for the sake of threads that it binds to cores."""
WORKER: Final = "workers.vllm_engine.cpu_worker.SeededCpuWorker"
THREADS_BIND: Final = "VLLM_CPU_OMP_THREADS_BIND"
VARIABLES: Final = {"VLLM_USE_AOT_COMPILE": "0"}


def arguments(given: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """Return the arguments of vLLM's engine that `given` leaves open. `environ`: what vLLM's processes will have."""
    found: dict[str, Any] = {"worker_cls": WORKER}
    has_parts = any(given.get(f"{kind}_parallel_size", 1) != 1 for kind in ("tensor", "pipeline", "data"))
    if not has_parts and environ.get(THREADS_BIND) == "nobind":
        found["distributed_executor_backend"] = IN_ONE_PROCESS
    if given.get("enable_chunked_prefill") is not False:
        found["max_num_batched_tokens"] = max(STEP_TOKENS, given.get("max_num_seqs", 0))
    return {name: value for name, value in found.items() if name not in given}
