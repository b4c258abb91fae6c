"""A directory of safetensors as a `Checkpoint`: one file or shards with an index, config.json beside them.

Knows nothing of hubs; `cluster` fetched the directory. Quantised checkpoints are refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from workers.errors import ModelFileError
from workers.weights.checkpoint import checked, of_size
from workers.weights.directory import SAFETENSORS, read_config, weight_files
from workers.weights.shape import ModelShape, from_config


class SafetensorsCheckpoint:
    """Raises ModelFileError if a file is missing or corrupt, or the architecture is not supported."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.shape: ModelShape = from_config(read_config(directory))
        self._handles = {path.name: _open(path) for path in weight_files(directory, SAFETENSORS)}
        self._file_of = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        return checked(self.stored(name, *size), f"{self._file_of[name]}: tensor {name}")

    def stored(self, name: str, *size: int) -> torch.Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise ModelFileError(f"{self._directory.name}: tensor {name} is missing")
        where = f"{file}: tensor {name}"
        try:
            tensor: torch.Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ModelFileError(f"{where}: {error}") from error
        return of_size(tensor, where, size)

    def array(self, name: str, *size: int) -> npt.NDArray[np.float32]:
        found: npt.NDArray[np.float32] = self.tensor(name, *size).numpy()
        return found

    def quantised(self, name: str, *size: int) -> None:
        """No file of this kind is quantised."""


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path.name}: corrupt or truncated: {error}") from error
