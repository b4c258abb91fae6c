"""The packed weights of a model on this node: packed by the first replica, mapped by all.

    <directory>/<mode>.packed   complete: renamed into place in one step, never changed afterwards
    <directory>/<mode>.lock     held by the process that packs
    <directory>/<mode>.new      being written

A hit opens neither the model's own files nor what reads them (torch, gguf). A file that is cut, damaged or of another
release is packed again; a directory that cannot be written is done without. The directory is one model's own.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from workers.weights.checkpoint import Checkpoint, open_checkpoint
from workers.weights.packed import PackedModel, assemble
from workers.weights.packed_file import PackedKey, UnusableFileError, read_packed, write_packed
from workers.weights.packed_mode import PackingMode, packed_parts
from workers.weights.shape import ModelShape

Check = Callable[[ModelShape], object]

_log = logging.getLogger(__name__)


def load_packed(
    weights: Path,
    weights_fingerprint: str,
    mode: PackingMode,
    directory: Path | None,
    *,
    check: Check = lambda shape: None,
    packs: Callable[[], object] = lambda: None,
) -> PackedModel:
    """Return the model at `weights`, mapped from `directory`, where it is packed first if need be.

    With no directory, or one that cannot be written, they are packed into this process's own memory. Blocks, also while
    another process packs. `check` is called with the shape before a tensor is read, and may raise; `packs` before
    minutes of packing, or of waiting for who packs. Raises ModelFileError and UnpackableError.
    """
    key = PackedKey(weights_fingerprint, mode)
    model = None if directory is None else _from_directory(weights, key, directory, check, packs)
    if model is None:
        packs()
        checkpoint = _open(weights, check)
        return assemble(checkpoint.shape, dict(packed_parts(checkpoint, mode)))
    check(model.shape)
    return model


def _from_directory(
    weights: Path, key: PackedKey, directory: Path, check: Check, packs: Callable[[], object]
) -> PackedModel | None:
    """Return the model mapped; None if the directory cannot be used."""
    path = directory / f"{key.mode}.packed"
    found = _read(path, key)
    if found is not None:
        return found
    packs()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / f"{key.mode}.lock"):
            found = _read(path, key)  # while this process waited, another one may have packed
            if found is None:
                _pack_to_file(weights, path, key, check)
        return found or read_packed(path, key)
    except (OSError, UnusableFileError) as error:
        _log.warning("packed weights are kept in this process's memory, for %s cannot be used: %s", path, error)
        return None


def _open(weights: Path, check: Check) -> Checkpoint:
    checkpoint = open_checkpoint(weights)
    check(checkpoint.shape)
    return checkpoint


def _read(path: Path, key: PackedKey) -> PackedModel | None:
    try:
        return read_packed(path, key)
    except FileNotFoundError:
        return None
    except UnusableFileError as error:
        _log.info("packing again: %s %s", path, error)
        return None
    except OSError as error:
        _log.info("packing again: %s cannot be read: %s", path, error)
        return None


def _pack_to_file(weights: Path, path: Path, key: PackedKey, check: Check) -> None:
    started = time.monotonic()
    checkpoint = _open(weights, check)
    new = path.with_suffix(".new")
    try:
        size = write_packed(new, key, checkpoint.shape, packed_parts(checkpoint, key.mode))
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
    _log.info("packed %s (%s) in %.1f s: %.0f MB", weights.name, key.mode, time.monotonic() - started, size / 1e6)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold `path` against other processes. The file stays: removing it would let two processes lock two files."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("another process is packing %s; waiting for it", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
