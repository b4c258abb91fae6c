"""Loads a decoder through transformers, to be computed over our blocks, or says why it cannot be.

Reads a directory as transformers writes it, on this machine alone; code that comes with a model is never run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from workers import kernels
from workers.config import EngineConfig
from workers.errors import ConfigError, ModelFileError
from workers.forward import ServedShape
from workers.models.quantised import check_quantisation
from workers.threads import set_threads
from workers.types import ModelFiles
from workers.weights.directory import read_config
from workers.weights.generic_shape import max_positions_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROPE_BY_LENGTH = ("dynamic", "longrope")
"""Whose angles depend on the longest sequence of a step: those beside it would be computed otherwise."""
LAYER_TYPES = {"full_attention", "sliding_attention", "chunked_attention"}


def load_decoder(config: EngineConfig, files: ModelFiles, threads: int, check: Callable[[ServedShape], object]) -> Any:
    """Return a `TransformersModel`. Raises ConfigError and ModelFileError. In a thread that ends, as
    `models.loading.load_torch` does."""
    dtype = choose_dtype(config)

    def load() -> Any:
        set_threads(threads)
        return _load(config, files.weights, dtype, check)

    with ThreadPoolExecutor(1) as executor:
        return executor.submit(load).result()


def check_keys(config: EngineConfig) -> None:
    """Raises ConfigError for what is not transformers' to choose."""
    if config.kernels == "native":
        raise ConfigError("engine.kernels must be auto or torch with engine transformers, is 'native'")
    for key, wanted in (("device", ("auto", "cpu")), ("weights", ("auto",))):
        if getattr(config, key) not in wanted:
            raise ConfigError(
                f"engine.{key} must be one of {', '.join(wanted)} with engine transformers, is {getattr(config, key)!r}"
            )


def choose_dtype(config: EngineConfig) -> torch.dtype:
    """Raises ConfigError."""
    check_keys(config)
    if config.dtype == "auto":
        return kernels.native_dtype()
    if config.dtype not in DTYPES:
        raise ConfigError(
            f"engine.dtype must be one of auto, {', '.join(DTYPES)} with engine transformers, is {config.dtype!r}"
        )
    return DTYPES[config.dtype]


def open_module(path: Path, auto_class: str, dtype: torch.dtype, **given: Any) -> Any:
    """Return the module in `path`, by one of transformers' Auto classes, in eval mode. Raises ModelFileError."""
    if not path.is_dir():
        raise ModelFileError(f"{path}: engine transformers reads directories with a config.json, this is a file")
    check_quantisation(read_config(path))
    try:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except ImportError as error:
        raise ModelFileError(f"engine transformers needs the package transformers: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = getattr(transformers, auto_class).from_pretrained(
                str(path), dtype=dtype, local_files_only=True, trust_remote_code=False, **given
            )
    except Exception as error:  # of any kind: it is other people's code and files
        raise ModelFileError(f"transformers cannot load it: {type(error).__name__}: {error}") from error
    return module.eval()


def _load(config: EngineConfig, path: Path, dtype: torch.dtype, check: Callable[[ServedShape], object]) -> Any:
    from workers.models import alibi, probe
    from workers.models.interface import IMPLEMENTATION, Calls
    from workers.models.transformers_model import TransformersModel

    module = open_module(path, "AutoModelForCausalLM", dtype, attn_implementation="eager")
    described = module.config.get_text_config()
    has_alibi = described.model_type in alibi.MODEL_TYPES
    max_positions = max_positions_of(described.to_dict())
    _check_config(described, config.max_model_len or max_positions)
    if has_alibi and dtype is not torch.float32:
        raise ConfigError("engine.dtype must be fp32 for ALiBi, whose positions bf16 rounds")
    tokens = probe.probe_tokens(described.vocab_size)
    expected = [probe.plain_logits(module, ids) for ids in tokens]
    calls, positions = Calls(), alibi.Positions()
    calls.bind(module)
    if has_alibi:
        positions.rows = torch.arange(len(tokens[0]))
        alibi.attach(module, calls, positions)
    else:
        try:
            module.set_attn_implementation(IMPLEMENTATION)
        except (ValueError, KeyError, ImportError) as error:
            raise ModelFileError(f"it takes no attention but its own: {error}") from error
    layers = probe.asked_layers(module, calls, tokens[0])
    model = TransformersModel(module, calls, positions, layers, max_positions)
    check(model.shape)
    probe.check_equal(model, expected, tokens)
    return model


def _check_config(described: Any, max_model_len: int) -> None:
    """Refuse what a short probe cannot show. Raises ModelFileError."""
    if others := sorted(set(getattr(described, "layer_types", None) or ()) - LAYER_TYPES):
        raise ModelFileError(f"it has layers of type {', '.join(others)}, which need another cache than blocks")
    chunk = getattr(described, "attention_chunk_size", None)
    if chunk and max_model_len > chunk:
        raise ModelFileError(
            f"it attends in chunks of {chunk} tokens; it can be served with engine.max_model_len {chunk} or less"
        )
    rope = getattr(described, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = parameters.get("rope_type")
        if kind not in ROPE_BY_LENGTH:
            continue
        original = parameters.get("original_max_position_embeddings") or described.max_position_embeddings
        if max_model_len > original:
            raise ModelFileError(
                f"its rotary embedding ({kind}) depends on the longest sequence of a step beyond {original} tokens; it "
                f"can be served with engine.max_model_len {original} or less"
            )
