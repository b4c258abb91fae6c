"""The real model, ours and the reference's, and engines over it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.oracle import loaded
from tests.oracle.answers import Committed, committed_answers
from workers.build import read_manifest
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.forward import LoadedModel
from workers.models.llama import LlamaModel
from workers.native import library
from workers.native.model import NativeDtype
from workers.paged import assemble
from workers.types import ModelFiles

NewEngine = Callable[..., PagedEngine]
ExpectedLogits = Callable[[Committed], torch.Tensor]


KERNELS = ("chosen", pytest.param("torch", marks=pytest.mark.exact))
"""Those that this machine chooses; torch as well in `make exact`."""


@pytest.fixture(scope="session", params=KERNELS)
def fp32_model(request: pytest.FixtureRequest, default_model: ModelFiles) -> LoadedModel:
    return loaded_model(default_model, request.param, NativeDtype.FP32)


@pytest.fixture(scope="session", params=KERNELS)
def bf16_model(request: pytest.FixtureRequest, default_model: ModelFiles) -> LoadedModel:
    return loaded_model(default_model, request.param, NativeDtype.BF16)


@pytest.fixture(scope="session")
def int8_model(default_model: ModelFiles) -> LoadedModel:
    if library.library() is None:
        pytest.skip("native kernels: the C library was not built")
    return loaded.native_model(default_model.weights, NativeDtype.INT8)


@pytest.fixture(scope="session")
def torch_model(default_model: ModelFiles) -> LlamaModel:
    return loaded.model(default_model.weights, torch.float32)


def loaded_model(model: ModelFiles, kernels: str, dtype: NativeDtype) -> LoadedModel:
    if kernels == "torch" or library.library() is None:
        return loaded.model(model.weights, torch.float32 if dtype is NativeDtype.FP32 else torch.bfloat16)
    return loaded.native_model(model.weights, dtype)


@pytest.fixture(scope="session")
def committed() -> list[Committed]:
    return committed_answers()


@pytest.fixture(scope="session")
def expected_logits(default_model: ModelFiles) -> ExpectedLogits:
    """Returns the reference's logits at every position of prompt and answer; computed once."""
    return lambda entry: loaded.expected(default_model.weights, (*entry.prompt, *entry.answer))


@pytest.fixture(scope="session")
def new_engine(default_model: ModelFiles) -> NewEngine:
    """Makes an engine with an empty cache over a loaded model."""
    manifest = read_manifest(default_model.manifest)

    def make(
        model: LoadedModel,
        *,
        chunk_tokens: int,
        max_num_sequences: int,
        num_blocks: int = 512,
        max_model_len: int = 2048,
        lookup_tokens: int = 0,
    ) -> PagedEngine:
        config = EngineConfig(
            chunk_tokens=chunk_tokens,
            max_num_sequences=max_num_sequences,
            num_blocks=num_blocks,
            max_model_len=max_model_len,
            lookup_tokens=lookup_tokens,
        )
        return assemble(config, model, manifest, hash_key=b"oracle")

    return make
