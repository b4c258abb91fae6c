"""Loads a model to be computed with torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from workers import kernels
from workers.config import EngineConfig
from workers.models.llama import LlamaModel
from workers.threads import set_threads
from workers.types import ModelFiles
from workers.weights.checkpoint import open_checkpoint
from workers.weights.shape import ModelShape

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def load_torch(
    config: EngineConfig, files: ModelFiles, threads: int, check: Callable[[ModelShape], object]
) -> LlamaModel:
    """See `workers.loading.load_model`. Sets how many threads torch uses in this process.

    Loads in a thread that ends. OpenMP keeps a team for every thread that ever computed in parallel, and while there
    are more threads in teams than processors, those of a team that meet put each other to sleep instead of waiting a
    few microseconds: a second team, though idle, doubled the time of a step with one row.
    """

    def load() -> LlamaModel:
        set_threads(threads)
        checkpoint = open_checkpoint(files.weights)
        check(checkpoint.shape)
        return LlamaModel(checkpoint, kernels.native_dtype() if config.dtype == "auto" else _DTYPES[config.dtype])

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(load).result()
