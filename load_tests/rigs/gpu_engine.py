"""Our engine on a GPU over random weights that are made there, for `gpu_bench`."""

from __future__ import annotations

import zlib
from typing import Any

import torch

from load_tests.rigs.gpu_cases import MAX_MODEL_LEN
from workers.config import EngineConfig
from workers.cuda import gpu_memory
from workers.engine import PagedEngine
from workers.gpu.model import GpuModel
from workers.paged_on_gpu import assemble_on_device
from workers.types import ModelManifest
from workers.weights.shape import ModelShape, from_config

CHUNK_TOKENS = 8_192
"""The engine's own default on a GPU."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where there is no GPU triton interprets the kernels, if TRITON_INTERPRET says so: to try a rig, not to measure."""


class RandomCheckpoint:
    """Implements as much of `Checkpoint` as a model on a GPU needs: a tensor is the same whenever it is asked for."""

    def __init__(self, shape: ModelShape, *, std: float = 0.02, seed: int = 0) -> None:
        self.shape = shape
        self._std = std
        self._seed = seed
        self._generator = torch.Generator(DEVICE)

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=torch.bfloat16, device=DEVICE)
        self._generator.manual_seed(self._seed + zlib.crc32(name.encode()))
        empty = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
        return empty.normal_(0.0, self._std, generator=self._generator)

    stored = tensor


def open_engine(config: dict[str, Any], *, hash_key: bytes = b"bench", **keys: Any) -> PagedEngine:
    """Return an engine for the model of a config.json; `keys` are those of `EngineConfig`."""
    shape = from_config(config)
    defaults: dict[str, Any] = {"max_num_sequences": 256, "max_model_len": MAX_MODEL_LEN}
    settings = EngineConfig(device="cuda", **(defaults | keys))
    settings.check()
    dtype = torch.float32 if settings.dtype == "fp32" else torch.bfloat16
    model = GpuModel(RandomCheckpoint(shape), dtype, DEVICE)
    return assemble_on_device(settings, model, manifest(shape), hash_key=hash_key, memory=device_memory())


def device_memory() -> tuple[int, int]:
    """Return the bytes that are free on the device, and those that it has; 1 GiB without one."""
    return gpu_memory() if DEVICE.type == "cuda" else (1 << 30, 1 << 30)


def manifest(shape: ModelShape) -> ModelManifest:
    """Return what there is to say of a model that is in no file."""
    return ModelManifest(
        name="random",
        architecture=shape.architecture,
        vocab_size=shape.vocab_size,
        max_model_len=shape.max_positions,
        eos_token_ids=(),
        bos_token_id=None,
        weights_format="safetensors",
        model_fingerprint="",
        tokenizer_fingerprint="",
        weights_fingerprint="",
    )
