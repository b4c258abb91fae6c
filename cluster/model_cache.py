"""Where fetched models live: one directory per model below the user's cache, filled once and then only read.

    <cache>/models/<key>/       complete: renamed into place in one step, never changed afterwards
    <cache>/models/<key>.lock   held by the process that fills <key>
    <cache>/models/.new-*       being filled; what a crash left behind is removed by the next fill
    <cache>/packed/<key>/       what replicas made of the weights of <key> and share; may be deleted at any time

Processes and replicas of one machine may ask for the same model at once: one fills, the others wait. Knows no formats.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from workers.errors import ModelFileError


def default_cache_dir() -> Path:
    """Return $OCTAVO_CACHE_DIR, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo."""
    if own := os.environ.get("OCTAVO_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser().absolute() / "octavo"
    return Path.home() / ".cache" / "octavo"


class ModelCache:
    """The models below `root`."""

    def __init__(self, root: Path | None = None) -> None:
        self._models = (root or default_cache_dir()) / "models"

    def entry(self, key: str) -> Path:
        """Return the directory of `key`; it exists only if it is complete."""
        return self._models / key

    def packed(self, entry: Path) -> Path:
        """Return where replicas keep packed weights of the model described in `entry`; it need not exist."""
        return self._models.with_name("packed") / entry.name

    def entries(self) -> list[Path]:
        """Return the complete entries, sorted by key."""
        if not self._models.is_dir():
            return []
        return sorted(path for path in self._models.iterdir() if path.is_dir() and not path.name.startswith("."))

    def fill(
        self,
        key: str,
        build: Callable[[Path], None],
        *,
        is_valid: Callable[[Path], bool],
        waiting: Callable[[], None] | None = None,
    ) -> Path:
        """Return the entry of `key`, made by `build` in an empty directory unless a valid one is there already.

        `waiting` is called when another process is filling it. Raises ModelFileError when the cache cannot be written,
        and whatever `build` raises; nothing stays behind then.
        """
        entry = self.entry(key)
        if entry.is_dir() and is_valid(entry):
            return entry
        try:
            self._models.mkdir(parents=True, exist_ok=True)
            with _locked(self._models / f"{key}.lock", waiting):
                if not (entry.is_dir() and is_valid(entry)):
                    self._build(entry, build)
        except OSError as error:
            raise ModelFileError(f"the model cache {self._models} cannot be written: {error}") from error
        return entry

    def _build(self, entry: Path, build: Callable[[Path], None]) -> None:
        prefix = f".new-{entry.name}-"
        for left_over in self._models.glob(f"{prefix}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        new = Path(tempfile.mkdtemp(prefix=prefix, dir=self._models))
        try:
            build(new)
            new.chmod(0o755)
            if entry.exists():
                shutil.rmtree(entry)
            new.rename(entry)
        finally:
            shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, waiting: Callable[[], None] | None) -> Iterator[None]:
    """Hold `path` against other processes. The file stays: removing it would let two processes lock two files."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting is not None:
                waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
