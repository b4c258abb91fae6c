"""Chooses how a model is computed on this machine, and loads it for that.

dtype     kernels native                              kernels torch
fp32      fp32 activations, cache in fp32             fp32
bf16      fp32 activations, cache in fp16             bf16; fp32 with weights in fp16 if the CPU has no bf16
int8      int8 activations, cache in fp16             refused
auto      int8, or fp32 if the shape forbids it       bf16 where the CPU multiplies it, else fp32
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.forward import LoadedModel, ServedShape
from workers.native import library
from workers.native.model import NativeDtype, NativeModel, can_round
from workers.types import ModelFiles, ModelManifest
from workers.weights.packed import PackedModel, UnpackableError
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import packing_mode
from workers.weights.shape import ModelShape

_log = logging.getLogger(__name__)


class _OtherDtypeError(Exception):
    """Activations of this shape are not what `auto` hoped for."""


def load_model(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    *,
    threads: int,
    check: Callable[[ServedShape], object],
    packs: Callable[[], object] = lambda: None,
) -> LoadedModel:
    """Return the model, ready to compute with `threads` threads. `check` is called with the shape before minutes of
    loading, `packs` before minutes of packing. Raises ConfigError if `config` asks for what this machine or the model
    cannot do, and ModelFileError."""
    if config.engine == "transformers":
        from workers.models.transformers_loading import load_decoder

        decoder: LoadedModel = load_decoder(config, files, threads, check)
        return decoder
    reason = why_not_native(config)
    if reason is None:
        try:
            return _load_native(config, files, manifest, threads, check, packs)
        except UnpackableError as error:
            reason = str(error)
    if config.kernels == "native":
        raise ConfigError(f"engine.kernels must be auto or torch here, is 'native': {reason}")
    if config.dtype == "int8":
        raise ConfigError(f"engine.dtype must be auto, fp32 or bf16 here, is 'int8', for native kernels: {reason}")
    if config.kernels == "auto":
        _log.warning("computing with torch, slower than native kernels: %s", reason)
    # Not before it is known that torch computes: importing it takes longer than all else that a replica does to start.
    from workers.models.loading import load_torch

    return load_torch(config, files, threads, check)


def why_not_native(config: EngineConfig) -> str | None:
    """Return why the C library computes no model here, in words; None if it may."""
    if config.kernels == "torch":
        return "engine.kernels is 'torch'"
    if library.library() is None:
        return "the C library was not built; set-up needs a C compiler"
    return None


def _load_native(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    threads: int,
    check: Callable[[ModelShape], object],
    packs: Callable[[], object],
) -> NativeModel:
    """Raises UnpackableError for a model that only torch computes."""

    def load(dtype: NativeDtype) -> PackedModel:
        def check_all(shape: ModelShape) -> None:
            check(shape)
            if choose_dtype(config, shape) is not dtype:
                raise _OtherDtypeError

        mode = packing_mode(config.weights, dtype.name.lower())
        return load_packed(
            files.weights, manifest.weights_fingerprint, mode, files.packed, check=check_all, packs=packs
        )

    dtype = NativeDtype.INT8 if config.dtype == "auto" else NativeDtype[config.dtype.upper()]
    try:
        packed = load(dtype)
    except _OtherDtypeError:
        dtype = NativeDtype.FP32
        packed = load(dtype)
    return NativeModel(packed, dtype, threads=threads)


def choose_dtype(config: EngineConfig, shape: ModelShape) -> NativeDtype:
    """Return what the C library does with activations. Raises ConfigError."""
    if config.dtype == "auto":
        return NativeDtype.INT8 if can_round(shape) else NativeDtype.FP32
    dtype = NativeDtype[config.dtype.upper()]
    if dtype is NativeDtype.INT8 and not can_round(shape):
        raise ConfigError(
            "engine.dtype must be auto, fp32 or bf16 for this model, is 'int8': hidden size, head size and ffn size "
            f"must be multiples of 32, are {shape.hidden_size}, {shape.head_dim}, {shape.ffn_size}"
        )
    return dtype
