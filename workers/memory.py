"""How much memory this process may still take, and how many KV blocks go into it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


USUAL_TOKENS = 1_024
"""How long a sequence is taken to be when a pool of `max_num_sequences` of them is sized: a model's longest is many
times what is usual, and memory promised to it is missing elsewhere. Longer sequences are served, fewer at a time."""


@dataclass(frozen=True, slots=True)
class PoolSize:
    num_blocks: int
    explanation: str
    """The sum, for people."""


def size_pool(config: EngineConfig, *, bytes_per_block: int, max_model_len: int, free_bytes: int) -> PoolSize:
    """Choose the number of KV blocks.

    `config.num_blocks` if it is given and fits into this replica's share of the free memory; otherwise as many as fit
    into `kv_memory_fraction` of that share, at most what `max_num_sequences` sequences of `USUAL_TOKENS` need. Either
    way at least one sequence of `max_model_len` must fit, since a request of that length is valid. Raises ConfigError
    or ModelFileError with the numbers if it does not.
    """
    least = -(-max_model_len // config.block_size)
    num_sharing = max(1, config.replicas_per_node)
    share = free_bytes // num_sharing
    shared = f"{free_bytes / 1e9:.2f} GB free" + (f" / {num_sharing} replicas of a node" if num_sharing > 1 else "")
    if config.num_blocks:
        num_blocks, reason = config.num_blocks, "engine.num_blocks"
        _check_num_blocks(config, bytes_per_block, max_model_len, share, shared)
    else:
        fraction = f"engine.kv_memory_fraction {config.kv_memory_fraction} of {shared}"
        budget = int(share * config.kv_memory_fraction)
        fitting = budget // bytes_per_block
        if fitting < least:
            raise ModelFileError(
                f"the KV cache does not fit: one sequence of {max_model_len} tokens needs {least} blocks x "
                f"{bytes_per_block:,} bytes = {least * bytes_per_block / 1e9:.2f} GB, {fraction} is "
                f"{budget / 1e9:.2f} GB; lower engine.max_model_len or raise engine.kv_memory_fraction"
            )
        usual_tokens = min(max_model_len, USUAL_TOKENS)
        most = max(least, config.max_num_sequences * -(-usual_tokens // config.block_size))
        num_blocks = min(fitting, most)
        reason = (
            fraction
            if num_blocks < most
            else f"enough for engine.max_num_sequences {config.max_num_sequences} of {usual_tokens:,} tokens each"
        )
    return PoolSize(
        num_blocks,
        f"KV cache: {num_blocks:,} blocks of {config.block_size} tokens x {bytes_per_block:,} bytes = "
        f"{num_blocks * bytes_per_block / 1e9:.2f} GB ({reason}); "
        f"one sequence of {max_model_len:,} tokens needs {least:,}",
    )


def _check_num_blocks(config: EngineConfig, bytes_per_block: int, max_model_len: int, share: int, shared: str) -> None:
    """Raise ConfigError unless the given number of blocks holds one sequence and fits into `share` bytes."""
    num_blocks, least = config.num_blocks, -(-max_model_len // config.block_size)
    if num_blocks < least:
        raise ConfigError(
            f"engine.num_blocks must be >= {least}, which one sequence of engine.max_model_len {max_model_len} "
            f"needs in blocks of {config.block_size} tokens; is {num_blocks}"
        )
    if num_blocks * bytes_per_block > share:
        raise ConfigError(
            f"engine.num_blocks must be <= {share // bytes_per_block:,}, which {shared} holds in blocks of "
            f"{bytes_per_block:,} bytes; is {num_blocks:,}, {num_blocks * bytes_per_block / 1e9:.2f} GB"
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
