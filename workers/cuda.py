"""Whether this process computes on an NVIDIA GPU, and how much of its memory a KV cache may take.

Imports torch only where a driver is loaded: a replica without a GPU may do without torch altogether.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Final

from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError
from workers.memory import PoolSize

DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"))
LEAST_CAPABILITY: Final = (8, 0)
"""Of a GPU that multiplies bf16."""
MAX_BLOCKS: Final = 65_536
"""More would hold more prefixes, but the host keeps books of each."""


def choose_device(config: EngineConfig) -> str:
    """Return "cuda" or "cpu". Raises ConfigError if `config` asks for a GPU where there is none, or for what a GPU
    does not do."""
    if config.device == "cpu":
        return "cpu"
    other = _only_on_cpu(config)
    if config.device == "auto":
        return "cpu" if other is not None or why_no_cuda() is not None else "cuda"
    if other is not None:
        key, rule, value = other
        raise ConfigError(f"engine.{key} must be {rule} with engine.device cuda, is {value!r}")
    reason = why_no_cuda()
    if reason is not None:
        raise ConfigError(f"engine.device must be auto or cpu here, is 'cuda': {reason}")
    return "cuda"


def why_no_cuda() -> str | None:
    """Return why this process computes on no GPU, in words; None if it may."""
    if not any(path.exists() for path in DRIVER_FILES):
        return "no NVIDIA driver is loaded on this node"
    missing = [name for name in ("torch", "triton") if find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} must be installed"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU is visible to this process; a replica sees as many as resources.num_gpus says"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        name, have = torch.cuda.get_device_name(), ".".join(map(str, capability))
        return f"{name} has compute capability {have}, kernels need {'.'.join(map(str, LEAST_CAPABILITY))}"
    return None


def gpu_memory() -> tuple[int, int]:
    """Return the bytes of the GPU that are free, and those that it has."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return int(free_bytes), int(total_bytes)


def size_gpu_pool(
    config: EngineConfig, *, bytes_per_block: int, max_model_len: int, free_bytes: int, total_bytes: int
) -> PoolSize:
    """Choose the number of KV blocks for a GPU on which the weights are already.

    `config.num_blocks` if it is given; otherwise what `gpu_memory_utilization` leaves, up to `MAX_BLOCKS` or as many as
    `max_num_sequences` of `max_model_len` need, if that is more. Raises ConfigError or ModelFileError with the numbers
    if that does not fit, or holds no sequence of `max_model_len`.
    """
    block_size = config.block_size
    least = -(-max_model_len // block_size)
    budget = int(config.gpu_memory_utilization * total_bytes) - (total_bytes - free_bytes)
    fitting = max(0, budget // bytes_per_block)
    shared = (
        f"engine.gpu_memory_utilization {config.gpu_memory_utilization} of {total_bytes / 1e9:.2f} GB, of which "
        f"{(total_bytes - free_bytes) / 1e9:.2f} GB are in use"
    )
    if config.num_blocks and not least <= config.num_blocks <= fitting:
        raise ConfigError(
            f"engine.num_blocks must be in [{least:,}, {fitting:,}], from one sequence of engine.max_model_len "
            f"{max_model_len} to {shared}, in blocks of {bytes_per_block:,} bytes; is {config.num_blocks:,}"
        )
    if fitting < least:
        raise ModelFileError(
            f"the KV cache does not fit: one sequence of {max_model_len} tokens needs {least:,} blocks x "
            f"{bytes_per_block:,} bytes = {least * bytes_per_block / 1e9:.2f} GB, {shared}; lower engine.max_model_len "
            "or raise engine.gpu_memory_utilization"
        )
    most = max(MAX_BLOCKS, config.max_num_sequences * least)
    num_blocks = config.num_blocks or min(fitting, most)
    reason = "engine.num_blocks" if config.num_blocks else shared if num_blocks < most else "as many as the host keeps"
    return PoolSize(
        num_blocks,
        f"KV cache: {num_blocks:,} blocks of {block_size} tokens x {bytes_per_block:,} bytes = "
        f"{num_blocks * bytes_per_block / 1e9:.2f} GB ({reason}); one sequence of {max_model_len:,} tokens needs "
        f"{least:,}",
    )


def graph_sizes(max_rows: int) -> tuple[int, ...]:
    """Return the numbers of rows that graphs are made for: close enough for little padding, few enough to make."""
    steps = (range(1, 2), range(2, 4, 2), range(4, 8, 4), range(8, 64, 8), range(64, 256, 16), range(256, 512, 32))
    sizes = [size for step in steps for size in step] + list(range(512, 4_097, 64))
    return tuple(size for size in sizes if size < max_rows) + ((max_rows,) if max_rows else ())


def _only_on_cpu(config: EngineConfig) -> tuple[str, str, object] | None:
    """Return the first key that asks for what only a CPU does, what it must be instead, and its value."""
    rules = (
        ("dtype", "auto, bf16 or fp32", config.dtype, config.dtype == "int8"),
        ("weights", "auto, exact or bf16", config.weights, config.weights in ("int8", "int4")),
        ("kernels", "auto", config.kernels, config.kernels != "auto"),
        ("lookup_tokens", "0", config.lookup_tokens, config.lookup_tokens > 0),
    )
    return next(((key, rule, value) for key, rule, value, is_asked in rules if is_asked), None)
