"""Chooses how a model is computed on this machine, and loads it for that.

dtype     kernels native                           kernels torch
fp32      packed weights, fp32 activations         fp32
int8      packed weights, int8 activations         refused
bf16      refused                                  bf16
auto      int8, or fp32 if the shape forbids it    bf16 where the CPU multiplies it, else fp32
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from workers import kernels
from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.forward import LoadedModel
from workers.models.llama import LlamaModel
from workers.native import library
from workers.native.model import NativeModel, can_round
from workers.threads import set_threads
from workers.types import ModelFiles, ModelManifest
from workers.weights.checkpoint import open_checkpoint
from workers.weights.packed import PackedModel, UnpackableError
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import packing_mode
from workers.weights.shape import ModelShape

_TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_log = logging.getLogger(__name__)


def load_model(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    *,
    threads: int,
    check: Callable[[ModelShape], object],
) -> LoadedModel:
    """Return the model, ready to compute with `threads` threads. `check` is called with the shape before minutes of
    loading. Raises ConfigError if `config` asks for what this machine or the model cannot do, and ModelFileError."""
    reason = why_not_native(config)
    if reason is None:
        try:
            return _load_native(config, files, manifest, threads, check)
        except UnpackableError as error:
            reason = str(error)
    if config.kernels == "native":
        raise ConfigError(f"engine.kernels must be auto or torch here, is 'native': {reason}")
    if config.dtype == "int8":
        raise ConfigError(f"engine.dtype must be auto, fp32 or bf16 here, is 'int8', for native kernels: {reason}")
    if config.kernels == "auto" and config.dtype != "bf16":
        _log.warning("computing with torch, slower than native kernels: %s", reason)
    set_threads(threads)
    checkpoint = open_checkpoint(files.weights)
    check(checkpoint.shape)
    return LlamaModel(checkpoint, kernels.native_dtype() if config.dtype == "auto" else _TORCH_DTYPES[config.dtype])


def why_not_native(config: EngineConfig) -> str | None:
    """Return why the C library computes no model here, in words; None if it may."""
    if config.kernels == "torch":
        return "engine.kernels is 'torch'"
    if config.dtype == "bf16":
        return "engine.dtype is 'bf16', which torch computes"
    if library.library() is None:
        return "the C library was not built; set-up needs a C compiler"
    return None


def _load_native(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    threads: int,
    check: Callable[[ModelShape], object],
) -> NativeModel:
    """Raises UnpackableError for a model that only torch computes."""

    def load(dtype: str) -> PackedModel:
        mode = packing_mode(config.weights, dtype)
        return load_packed(files.weights, manifest.weights_fingerprint, mode, files.packed, check=check)

    packed = load("fp32" if config.dtype == "fp32" else "int8")
    arithmetic = choose_arithmetic(config, packed.shape)
    if arithmetic == library.EXACT and config.dtype == "auto":
        packed = load("fp32")
    # Sampling is all that torch does then; threads of its own would spin against the library's.
    set_threads(1)
    return NativeModel(packed, arithmetic=arithmetic, threads=threads)


def choose_arithmetic(config: EngineConfig, shape: ModelShape) -> int:
    """Return what the C library does with activations. Raises ConfigError."""
    if config.dtype == "fp32" or (config.dtype == "auto" and not can_round(shape)):
        return library.EXACT
    if not can_round(shape):
        raise ConfigError(
            "engine.dtype must be auto or fp32 for this model, is 'int8': hidden size, head size and ffn size must be "
            f"multiples of 32, are {shape.hidden_size}, {shape.head_dim}, {shape.ffn_size}"
        )
    return library.INT8
