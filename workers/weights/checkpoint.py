"""A model's weights on disk, as named tensors and a shape; names are those of Hugging Face's Llama.

    open_checkpoint(path) -> GgufCheckpoint         a .gguf file
                          -> SafetensorsCheckpoint  a directory with config.json and model*.safetensors
                          -> PickleCheckpoint       one with config.json and pytorch_model*.bin only

Tensors are read one at a time, so that a loader which packs as it goes never holds two copies of a model. Every tensor
can be had in fp32; those in one of `BLOCK_BYTES`'s quantisations also as they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from workers.errors import ModelFileError
from workers.weights.directory import PICKLES, weight_format
from workers.weights.shape import ModelShape

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""The quantisations of GGUF that are given out as they are, each with the bytes of its block of 32 numbers."""


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """A matrix as blocks of 32 numbers, in ggml's layout: `rows` is [outputs, inputs / 32 * BLOCK_BYTES[kind]]."""

    kind: str
    rows: npt.NDArray[np.uint8]


class Checkpoint(Protocol):
    @property
    def shape(self) -> ModelShape: ...

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        """Return the tensor `name` ("model.layers.0.mlp.up_proj.weight") as fp32, finite and of this size.

        Raises ModelFileError with the name if it is missing, of another size, unreadable or not finite.
        """

    def stored(self, name: str, *size: int) -> torch.Tensor:
        """Return what `tensor` returns in a floating-point type that has room for it, as the file has it where it has
        one; whether all of it is finite is for the caller to see. Raises what `tensor` raises."""

    def array(self, name: str, *size: int) -> npt.NDArray[np.float32]:
        """Return what `tensor` returns, without torch where the file can be read without. Raises what it raises."""

    def quantised(self, name: str, *size: int) -> QuantisedRows | None:
        """Return the blocks of the matrix `name`, whose rows are those of `tensor`; None if it is stored otherwise.

        Raises what `tensor` raises.
        """


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model file or directory: headers are checked now, tensors when they are read. Raises ModelFileError."""
    if path.is_dir() and weight_format(path) is PICKLES:
        from workers.weights.pickle_checkpoint import PickleCheckpoint

        return PickleCheckpoint(path)
    if path.is_dir():
        from workers.weights.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path)
    if path.is_file():
        from workers.weights.gguf_checkpoint import GgufCheckpoint

        return GgufCheckpoint(path)
    raise ModelFileError(f"{path}: no such model file or directory")


def checked(tensor: torch.Tensor, where: str) -> torch.Tensor:
    """Return `tensor` in fp32. Raises ModelFileError, naming `where`, for numbers not finite."""
    tensor = tensor.float()
    # A sum is not finite if any term is not: one pass without a mask of the tensor's size.
    if not tensor.sum().isfinite():
        raise ModelFileError(f"{where}: has numbers that are not finite")
    return tensor


def of_size(tensor: torch.Tensor, where: str, size: tuple[int, ...]) -> torch.Tensor:
    """Return `tensor`. Raises ModelFileError, naming `where`, if it is quantised or of another size."""
    if not tensor.is_floating_point():
        raise ModelFileError(f"{where}: is of type {tensor.dtype}, which needs a quantised kernel")
    if tuple(tensor.shape) != size:
        raise ModelFileError(f"{where}: size must be {list(size)}, is {list(tensor.shape)}")
    return tensor
