"""A directory of pytorch_model.bin as a `Checkpoint`: one file or shards with an index, config.json beside them.

The files are pickles. They are read by torch's restricted loader (`weights_only`), which builds tensors and containers
and refuses everything else by name, so that nothing in them is executed. Tensors are mapped, and read when asked for;
only files from before torch 1.6 are read at once.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from workers.errors import ModelFileError
from workers.weights.checkpoint import checked, of_size
from workers.weights.directory import PICKLES, read_config, weight_files
from workers.weights.shape import ModelShape, from_config


class PickleCheckpoint:
    """Raises ModelFileError if a file is missing, corrupt or holds more than tensors, or the architecture is not
    supported."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.shape: ModelShape = from_config(read_config(directory))
        self._tensors: dict[str, tuple[str, torch.Tensor]] = {}
        for path in weight_files(directory, PICKLES):
            self._tensors |= {name: (path.name, tensor) for name, tensor in _load(path).items()}

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        stored = self.stored(name, *size)
        return checked(stored, f"{self._tensors[name][0]}: tensor {name}")

    def stored(self, name: str, *size: int) -> torch.Tensor:
        if name not in self._tensors:
            raise ModelFileError(f"{self._directory.name}: tensor {name} is missing")
        file, tensor = self._tensors[name]
        return of_size(tensor, f"{file}: tensor {name}", size)

    def array(self, name: str, *size: int) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self.tensor(name, *size).numpy()
        return found

    def quantised(self, name: str, *size: int) -> None:
        """No file of this kind is quantised."""


def _load(path: Path) -> Mapping[str, torch.Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ModelFileError(f"{path.name}: holds more than tensors, or is corrupt: {_first_line(error)}") from error
    except Exception as error:  # of any kind: broken bytes end in a KeyError, an AssertionError, struct.error
        raise ModelFileError(f"{path.name}: corrupt or truncated: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path.name}: must hold tensors by name, holds a {type(content).__name__}")
    # Parameters, as some files hold, would not become arrays.
    return {str(name): value.detach() for name, value in content.items() if isinstance(value, torch.Tensor)}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
