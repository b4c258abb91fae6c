"""Which files of a directory are the model's weights, as transformers writes them. Standard library only.

safetensors   model.safetensors, or shards and model.safetensors.index.json
pickles       pytorch_model.bin, or shards and pytorch_model.bin.index.json; read only if there is no safetensors
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class WeightFormat:
    name: str
    single: str

    @property
    def index(self) -> str:
        return f"{self.single}.index.json"

    def is_in(self, directory: Path) -> bool:
        return (directory / self.single).exists() or (directory / self.index).exists()


SAFETENSORS = WeightFormat("safetensors", "model.safetensors")
PICKLES = WeightFormat("pickles", "pytorch_model.bin")


def weight_format(directory: Path) -> WeightFormat:
    """Return the format of the weights in `directory`: safetensors unless it has only pickles."""
    return PICKLES if PICKLES.is_in(directory) and not SAFETENSORS.is_in(directory) else SAFETENSORS


def weight_files(directory: Path, form: WeightFormat) -> list[Path]:
    """Return the files that make up the model, in a fixed order. Raises ModelFileError.

    The index decides if there is one: a directory may hold the same weights in both forms.
    """
    if not (directory / form.index).exists():
        if (directory / form.single).exists():
            return [directory / form.single]
        raise ModelFileError(f"{directory}: has neither {form.single} nor {form.index}")
    weight_map = read_json(directory / form.index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(
            f"{directory / form.index}: weight_map must name the file of each tensor, is {weight_map!r}"
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelFileError(
                f"{directory / form.index}: a file of weight_map must lie in the same directory, is {name!r}"
            )
        if not _exists(directory / name):
            raise ModelFileError(f"{directory / name}: is missing; {form.index} names it as one of {len(names)} files")
    return [directory / name for name in names]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # the name is none that a file can have
        return False


def read_config(directory: Path) -> dict[str, Any]:
    return read_json(directory / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelFileError, also for JSON that is no object."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileError(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path.name}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path.name}: must be a JSON object")
    return content
