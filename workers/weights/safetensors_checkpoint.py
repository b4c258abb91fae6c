"""A directory of safetensors as a `Checkpoint`: one file or shards with an index, config.json beside them.

Knows nothing of hubs; `cluster` fetched the directory. Quantised checkpoints are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from workers.errors import ModelFileError
from workers.weights.checkpoint import checked
from workers.weights.shape import ModelShape, from_config

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsCheckpoint:
    """Raises ModelFileError if a file is missing or corrupt, or the architecture is not supported."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        config = _read_json(directory / "config.json")
        self.shape: ModelShape = from_config(config)
        self._handles = {path.name: _open(path) for path in self._files()}
        self._file_of = {name: file for file, handle in self._handles.items() for name in handle.keys()}  # noqa: SIM118

    def tensor(self, name: str, *size: int) -> torch.Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise ModelFileError(f"{self._directory.name}: tensor {name} is missing")
        where = f"{file}: tensor {name}"
        try:
            tensor: torch.Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, RuntimeError) as error:
            raise ModelFileError(f"{where}: {error}") from error
        if not tensor.is_floating_point():
            raise ModelFileError(f"{where}: is of type {tensor.dtype}, which needs a quantised kernel")
        return checked(tensor, where, size)

    def _files(self) -> list[Path]:
        """The index decides if there is one: a directory may hold the same weights in both forms."""
        if not (self._directory / INDEX).exists():
            if (self._directory / SINGLE).exists():
                return [self._directory / SINGLE]
            raise ModelFileError(f"{self._directory}: has neither {SINGLE} nor {INDEX}")
        index = _read_json(self._directory / INDEX)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFileError(f"{INDEX}: has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name:
                raise ModelFileError(f"{INDEX}: {name!r} is not a file of this directory")
            if not (self._directory / name).exists():
                raise ModelFileError(f"{INDEX}: shard {name} is missing")
        return [self._directory / name for name in names]


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path.name}: corrupt or truncated: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFileError(f"{path.name}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path.name}: must be a JSON object")
    return content
