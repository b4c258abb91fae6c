"""What vLLM is started with: arguments from `EngineConfig`, and variables that it reads itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.types import ModelFiles
from workers.vllm_engine import on_cpu, versions
from workers.vllm_engine.directory import directory_of, has_tokenizer

DTYPES: Final = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16"}
VARIABLES: Final = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", on_cpu.THREADS_BIND: "nobind"}
"""vLLM asks nobody, tells nobody, and leaves it to the system where its threads run: bound, the engines of two replicas
would share a core."""


OURS_ALONE: Final = ("lookup_tokens", "weights", "kernels", "reserve", "device", "block_size", "kv_memory_fraction")
"""Keys that say nothing to vLLM: each must be what it is if nobody says anything."""


@dataclass(frozen=True, slots=True)
class Setup:
    arguments: Mapping[str, Any]
    directory: Path
    """For sockets, for as long as the scope of `prepared`."""
    events_endpoint: str


@contextmanager
def prepared(config: EngineConfig, files: ModelFiles, threads: int) -> Iterator[Setup]:
    """Yield what vLLM is to be started with; what it needs besides lasts as long as the scope.

    Raises ConfigError and ModelFileError.
    """
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray has set it by what the replica reserves
    directory = tempfile.mkdtemp(prefix="octavo-vllm-")
    try:
        endpoint = f"ipc://{directory}/cache" if config.prefix_cache else ""
        given = arguments(config, directory_of(files, config.dtype))
        if versions.is_on_cpu():
            for name, value in on_cpu.VARIABLES.items():
                os.environ.setdefault(name, value)
            given |= on_cpu.arguments(given, os.environ)
        yield Setup(given, Path(directory), endpoint)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def arguments(config: EngineConfig, model: Path) -> dict[str, Any]:
    """Return the arguments of vLLM's engine: ours by its names, then `config.vllm`, which has the last word."""
    if config.dtype not in DTYPES:
        raise ConfigError(f"engine.dtype must be one of {', '.join(DTYPES)} with engine vllm, is {config.dtype!r}")
    usual = EngineConfig()
    for key in OURS_ALONE:
        wanted = getattr(usual, key)
        if getattr(config, key) != wanted:
            raise ConfigError(
                f"engine.{key} must be {wanted!r} with engine vllm, which has ways of its own (engine.vllm); is "
                f"{getattr(config, key)!r}"
            )
    found: dict[str, Any] = {
        "model": str(model),
        # Nothing needs it but answers of a shape, which are held to it by the tokens that may come next.
        "skip_tokenizer_init": not has_tokenizer(model),
        "dtype": DTYPES[config.dtype],
        "max_num_seqs": config.max_num_sequences,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enable_prefix_caching": config.prefix_cache,
        "scheduling_policy": "priority",
    }
    if config.max_model_len:
        found["max_model_len"] = config.max_model_len
    if config.chunk_tokens:
        found["max_num_batched_tokens"] = config.chunk_tokens
    if config.num_blocks:
        found["num_gpu_blocks_override"] = config.num_blocks
    if config.devices_of_vllm > 1:
        found["distributed_executor_backend"] = "mp"  # a process for each GPU that Ray gave this replica
    return found | dict(config.vllm)
