"""Puts the engine `transformers` together for a model that embeds or classifies."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from workers.config import EngineConfig
from workers.errors import ConfigError
from workers.pooling import STEP_TOKENS, PoolingEngine
from workers.prefix import PrefixHasher
from workers.types import CAPABILITY_POOL, EngineInfo, ModelFiles, ModelManifest

POOLING_ENDS = ("ForSequenceClassification", "ForTokenClassification", "Model")
"""Of the names of architectures without a head that says next tokens."""


def is_pooling(files: ModelFiles, manifest: ModelManifest) -> bool:
    """Whether a model is one that embeds or classifies: by its architecture, or as sentence-transformers wrote it."""
    name = manifest.architecture
    is_headless = name.endswith(POOLING_ENDS) and not name.endswith("HeadModel")
    return is_headless or (files.weights.is_dir() and (files.weights / "modules.json").exists())


def build_pooling(
    config: EngineConfig,
    files: ModelFiles,
    manifest: ModelManifest,
    *,
    hash_key: bytes,
    threads: int,
    clock: Callable[[], float] = time.monotonic,
) -> PoolingEngine:
    """See `build_engine`. Loads in a thread that ends, as `models.loading.load_torch` does."""
    _check(config, manifest)
    from workers.models.encoder import EncoderModel  # imports torch
    from workers.models.transformers_loading import check_keys
    from workers.threads import set_threads

    check_keys(config)

    def load() -> EncoderModel:
        set_threads(threads)
        return EncoderModel(files.weights, manifest.architecture)

    with ThreadPoolExecutor(1) as executor:
        model = executor.submit(load).result()
    hasher = PrefixHasher(hash_key, config.block_size)
    info = EngineInfo(
        engine=config.engine,
        model=manifest.name,
        block_size=config.block_size,
        num_blocks=1,
        max_model_len=config.max_model_len or manifest.max_model_len,
        vocab_size=manifest.vocab_size,
        model_fingerprint=manifest.model_fingerprint,
        tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        weights_fingerprint=manifest.weights_fingerprint,
        hash_key_fingerprint=hasher.key_fingerprint,
        capabilities=model.capabilities | {CAPABILITY_POOL},
        dtype=model.dtype_name,
        kernels=model.kernels,
    )
    return PoolingEngine(model, info=info, hasher=hasher, step_tokens=config.chunk_tokens or STEP_TOKENS, clock=clock)


def _check(config: EngineConfig, manifest: ModelManifest) -> None:
    """Raises ConfigError."""
    if config.dtype not in ("auto", "fp32"):
        raise ConfigError(f"engine.dtype must be auto or fp32 for a model that embeds, is {config.dtype!r}")
    if config.max_model_len > manifest.max_model_len:
        raise ConfigError(
            f"engine.max_model_len must be at most {manifest.max_model_len}, for which {manifest.name} is made; is "
            f"{config.max_model_len}"
        )
    for key, wanted in (("lookup_tokens", 0), ("reserve", False)):
        if getattr(config, key) != wanted:
            raise ConfigError(
                f"engine.{key} must be {wanted!r} for a model that generates nothing, is {getattr(config, key)!r}"
            )
