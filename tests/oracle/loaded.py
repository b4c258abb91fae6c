"""The default model, ours and the reference's: read once a process, whichever tests ask for it."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from load_tests.rigs.reference import RememberedCheckpoint, load_reference, reference_logits
from workers.models.llama import LlamaModel
from workers.native.model import NativeDtype, NativeModel
from workers.weights.checkpoint import open_checkpoint
from workers.weights.packed_cache import load_packed
from workers.weights.packed_mode import PackingMode


@functools.cache
def checkpoint(weights: Path) -> RememberedCheckpoint:
    return RememberedCheckpoint(open_checkpoint(weights))


@functools.cache
def reference(weights: Path, dtype: torch.dtype) -> LlamaForCausalLM:
    return load_reference(checkpoint(weights), dtype)


@functools.cache
def model(weights: Path, dtype: torch.dtype) -> LlamaModel:
    return LlamaModel(checkpoint(weights), dtype)


@functools.cache
def native_model(weights: Path, dtype: NativeDtype) -> NativeModel:
    mode = PackingMode.INT8 if dtype is NativeDtype.INT8 else PackingMode.EXACT
    return NativeModel(load_packed(weights, "", mode, None), dtype, threads=2)


@functools.cache
def expected(weights: Path, tokens: tuple[int, ...]) -> torch.Tensor:
    """Return the fp32 reference's logits [tokens, vocab]. Shared: not to be written to."""
    return reference_logits(reference(weights, torch.float32), list(tokens))
