"""Puts the engines `paged` and `transformers` together: weights, KV cache, attention, runner, scheduler."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from workers import memory
from workers.config import EngineConfig
from workers.cuda import choose_device
from workers.engine import PagedEngine
from workers.errors import ConfigError, ModelFileError
from workers.forward import LoadedModel, ServedShape
from workers.kv_memory import KvMemory, bytes_per_block
from workers.loading import load_model
from workers.prefix import PrefixHasher
from workers.runner import CpuRunner
from workers.types import (
    CAPABILITY_GENERATE,
    CAPABILITY_LOGIT_BIAS,
    CAPABILITY_LOGPROBS,
    CAPABILITY_RECEIVED_CHOICES,
    CAPABILITY_RECEIVED_PENALTIES,
    EngineInfo,
    ModelFiles,
    ModelManifest,
)

_log = logging.getLogger(__name__)


def build_paged(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    *,
    hash_key: bytes,
    threads: int,
    clock: Callable[[], float],
    packs: Callable[[], object] = lambda: None,
) -> PagedEngine:
    """See `build_engine`."""
    if config.engine == "paged" and choose_device(config) == "cuda":
        from workers.paged_on_gpu import build_on_gpu  # imports torch

        return build_on_gpu(config, files, manifest, hash_key=hash_key, clock=clock)
    started = time.monotonic()
    model = load_model(
        config,
        files,
        manifest,
        threads=threads,
        check=lambda shape: choose_max_model_len(config, manifest, shape),
        packs=packs,
    )
    _log.info(
        "loaded %s in %.1f s: %s, kernels %s, %d threads",
        manifest.name,
        time.monotonic() - started,
        model.dtype_name,
        model.kernels,
        threads,
    )
    return assemble(config, model, manifest, hash_key=hash_key, clock=clock)


def assemble(
    config: EngineConfig,
    model: LoadedModel,
    manifest: ModelManifest,
    *,
    hash_key: bytes,
    clock: Callable[[], float] = time.monotonic,
) -> PagedEngine:
    """Return an engine with a KV cache of its own over a loaded model. Raises ConfigError and ModelFileError."""
    max_model_len = choose_max_model_len(config, manifest, model.shape)
    cache, memory_sum = _make_cache(config, model, max_model_len)
    hasher = PrefixHasher(hash_key, config.block_size)
    info = describe(config, model, manifest, num_blocks=cache.num_blocks, memory=memory_sum, hasher=hasher)
    runner = CpuRunner(model.over(cache), cache)
    return PagedEngine(config, info=info, runner=runner, hasher=hasher, clock=clock)


class Described(Protocol):
    """What an `EngineInfo` says of a model."""

    @property
    def shape(self) -> ServedShape: ...

    @property
    def dtype_name(self) -> str: ...

    @property
    def kernels(self) -> str: ...


def describe(
    config: EngineConfig,
    model: Described,
    manifest: ModelManifest,
    *,
    num_blocks: int,
    memory: str,
    hasher: PrefixHasher,
) -> EngineInfo:
    """Return what an engine over `model` says of itself; `memory`: how its pool was sized, in words."""
    return EngineInfo(
        engine=config.engine,
        model=manifest.name,
        block_size=config.block_size,
        num_blocks=num_blocks,
        max_model_len=choose_max_model_len(config, manifest, model.shape),
        vocab_size=model.shape.vocab_size,
        model_fingerprint=manifest.model_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        weights_fingerprint=manifest.weights_fingerprint,
        hash_key_fingerprint=hasher.key_fingerprint,
        capabilities=frozenset(
            {
                CAPABILITY_GENERATE,
                CAPABILITY_LOGPROBS,
                CAPABILITY_LOGIT_BIAS,
                CAPABILITY_RECEIVED_CHOICES,
                CAPABILITY_RECEIVED_PENALTIES,
            }
        ),
        dtype=model.dtype_name,
        kernels=model.kernels,
        memory=memory,
    )


def choose_max_model_len(config: EngineConfig, manifest: ModelManifest, shape: ServedShape) -> int:
    """Return the most tokens of prompt and answer together. Raises ConfigError or ModelFileError."""
    if manifest.vocab_size != shape.vocab_size:
        raise ModelFileError(
            f"the manifest of {manifest.name} says a vocabulary of {manifest.vocab_size}, its weights have "
            f"{shape.vocab_size}"
        )
    if config.max_model_len > shape.max_positions:
        raise ConfigError(
            f"engine.max_model_len must be at most {shape.max_positions}, for which {manifest.name} is made; is "
            f"{config.max_model_len}"
        )
    max_model_len = config.max_model_len or min(manifest.max_model_len, shape.max_positions)
    if shape.sliding_window is not None and max_model_len > shape.sliding_window:
        raise ModelFileError(
            f"{manifest.name} attends to a sliding window of {shape.sliding_window} tokens, which is not supported; it "
            f"can be served with engine.max_model_len {shape.sliding_window} or less, is {max_model_len}"
        )
    return max_model_len


def _make_cache(config: EngineConfig, model: LoadedModel, max_model_len: int) -> tuple[KvMemory, str]:
    """Return the cache and the sum by which it was sized."""
    shape = model.shape
    size = memory.size_pool(
        config,
        bytes_per_block=bytes_per_block(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            block_size=config.block_size,
            head_dim=shape.head_dim,
            dtype=model.cache_dtype,
        ),
        max_model_len=max_model_len,
        free_bytes=memory.free_memory(),
    )
    _log.info("%s", size.explanation)
    return model.new_cache(num_blocks=size.num_blocks, block_size=config.block_size), size.explanation
