"""How much memory this process may still take, and how many KV blocks go into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class PoolSize:
    num_blocks: int
    explanation: str
    """The sum, for the log."""


def size_pool(config: EngineConfig, *, bytes_per_block: int, max_model_len: int, free_bytes: int) -> PoolSize:
    """Choose the number of KV blocks.

    `config.num_blocks` if it is given; otherwise as many as fit into `kv_memory_fraction` of the free memory, at most
    what `max_num_sequences` sequences of `max_model_len` need. Either way at least one such sequence must fit, since
    a request of that length is valid. Raises ConfigError or ModelFileError with the numbers if it does not.
    """
    least = -(-max_model_len // config.block_size)
    if config.num_blocks:
        if config.num_blocks < least:
            raise ConfigError(
                f"engine.num_blocks must be >= {least}, which one sequence of engine.max_model_len {max_model_len} "
                f"needs in blocks of {config.block_size} tokens; is {config.num_blocks}"
            )
        num_blocks, reason = config.num_blocks, "engine.num_blocks"
    else:
        budget = int(free_bytes * config.kv_memory_fraction)
        fitting = budget // bytes_per_block
        if fitting < least:
            raise ModelFileError(
                f"the KV cache does not fit: one sequence of {max_model_len} tokens needs {least} blocks x "
                f"{bytes_per_block:,} bytes = {least * bytes_per_block / 1e9:.2f} GB, engine.kv_memory_fraction "
                f"{config.kv_memory_fraction} of {free_bytes / 1e9:.2f} GB free is {budget / 1e9:.2f} GB; lower "
                f"engine.max_model_len or raise engine.kv_memory_fraction"
            )
        most = least * config.max_num_sequences
        num_blocks = min(fitting, most)
        reason = (
            f"engine.max_num_sequences {config.max_num_sequences} of {max_model_len} tokens each"
            if num_blocks == most
            else f"engine.kv_memory_fraction {config.kv_memory_fraction} of {free_bytes / 1e9:.2f} GB free"
        )
    return PoolSize(
        num_blocks,
        f"KV cache: {num_blocks:,} blocks of {config.block_size} tokens x {bytes_per_block:,} bytes = "
        f"{num_blocks * bytes_per_block / 1e9:.2f} GB ({reason}); "
        f"one sequence of {max_model_len:,} tokens needs {least:,}",
    )


def free_memory() -> int:
    """Return the bytes that can be taken without swapping: the machine's, or its container's if those are fewer."""
    free = [_available_on_machine()]
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            free.append(int(limit) - int((_CGROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # no cgroup v2 here
    return max(0, min(free))


def _available_on_machine() -> int:
    try:
        lines = _MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        # No Linux: half of what is built in, since nothing portable says what is free.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
