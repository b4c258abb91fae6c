"""Puts the engine `paged` together on a GPU: weights, KV cache and graphs there, the scheduler one step ahead."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from typing import Protocol

from workers.config import GPU_CHUNK_TOKENS, EngineConfig
from workers.cuda import gpu_memory, graph_sizes, size_gpu_pool
from workers.device import Device
from workers.device_runner import DeviceRunner
from workers.engine import PagedEngine
from workers.paged import choose_max_model_len, describe
from workers.prefix import PrefixHasher
from workers.types import ModelFiles, ModelManifest
from workers.weights.checkpoint import open_checkpoint
from workers.weights.shape import ModelShape

_log = logging.getLogger(__name__)


class DeviceModel(Protocol):
    """Weights in the memory of an accelerator."""

    @property
    def shape(self) -> ModelShape: ...

    @property
    def dtype_name(self) -> str:
        """As `EngineConfig.dtype` names it."""

    @property
    def kernels(self) -> str:
        """Which kernels it computes with, for people."""

    def bytes_per_block(self, block_size: int) -> int:
        """Return what a KV block costs, all layers together."""

    def open(
        self,
        *,
        num_blocks: int,
        block_size: int,
        num_slots: int,
        max_model_len: int,
        chunk_tokens: int,
        graph_sizes: tuple[int, ...],
    ) -> Device:
        """Return the model at work over a KV cache of its own, of `num_blocks` and a spare one. Chunks of a step have
        at most `chunk_tokens` rows together."""


def build_on_gpu(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    *,
    hash_key: bytes,
    clock: Callable[[], float],
) -> PagedEngine:
    """See `build_engine`; `config` is one for which `choose_device` says "cuda"."""
    started = time.monotonic()
    import torch

    from workers.gpu.model import GpuModel

    checkpoint = open_checkpoint(files.weights)
    choose_max_model_len(config, manifest, checkpoint.shape)
    model = GpuModel(checkpoint, torch.float32 if config.dtype == "fp32" else torch.bfloat16, torch.device("cuda"))
    _log.info(
        "loaded %s in %.1f s: %s, kernels %s, on %s",
        manifest.name,
        time.monotonic() - started,
        model.dtype_name,
        model.kernels,
        torch.cuda.get_device_name(),
    )
    return assemble_on_device(config, model, manifest, hash_key=hash_key, memory=gpu_memory(), clock=clock)


def assemble_on_device(
    config: EngineConfig,
    model: DeviceModel,
    manifest: ModelManifest,
    *,
    hash_key: bytes,
    memory: tuple[int, int],
    clock: Callable[[], float] = time.monotonic,
) -> PagedEngine:
    """Return an engine with a KV cache of its own over a loaded model. `memory`: the bytes that are free on the device
    now, and those that it has. Raises ConfigError and ModelFileError."""
    config = dataclasses.replace(config, chunk_tokens=config.chunk_tokens or GPU_CHUNK_TOKENS)
    max_model_len = choose_max_model_len(config, manifest, model.shape)
    size = size_gpu_pool(
        config,
        bytes_per_block=model.bytes_per_block(config.block_size),
        max_model_len=max_model_len,
        free_bytes=memory[0],
        total_bytes=memory[1],
    )
    _log.info("%s", size.explanation)
    device = model.open(
        num_blocks=size.num_blocks,
        block_size=config.block_size,
        num_slots=(DeviceRunner.lag + 1) * config.max_num_sequences,
        max_model_len=max_model_len,
        chunk_tokens=config.chunk_tokens,
        graph_sizes=graph_sizes(min(config.max_graph_rows, config.max_num_sequences)),
    )
    hasher = PrefixHasher(hash_key, config.block_size)
    info = describe(config, model, manifest, num_blocks=size.num_blocks, memory=size.explanation, hasher=hasher)
    runner = DeviceRunner(device, config.block_size)
    return PagedEngine(config, info=info, runner=runner, hasher=hasher, clock=clock, lag=runner.lag)
