"""The file with the keyring: written by `octavo keys`, read by every router and again whenever it changes.

    write   under a lock, to a new file that takes the old one's place: a reader sees the one or the other, whole
    watch   by the file's time, size and number, once a second; a file that cannot be read leaves the last good keyring

Readable by its owner alone. On several nodes it is mounted, for instance from a Kubernetes Secret.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from router.keyring import Keyring, parse
from workers.errors import ConfigError

POLL_S = 1.0
MAX_BYTES = 64 * 1024 * 1024

_log = logging.getLogger(__name__)


class KeyFile:
    """A router's view of the file. The first reading must succeed."""

    def __init__(self, path: Path) -> None:
        """Raises ConfigError if the file cannot be read or is no keyring."""
        self._path = path
        self._seen = _stamp(path)
        self.keyring = read(path)
        self._complaint = ""

    def refresh(self) -> bool:
        """Read the file if it has changed; return whether there is a new keyring. Blocks, raises nothing."""
        try:
            seen = _stamp(self._path)
            if seen == self._seen:
                return False
            self.keyring = read(self._path)
        except ConfigError as error:
            if str(error) != self._complaint:
                self._complaint = str(error)
                _log.warning("the keys stay as they were: %s", error)
            return False
        self._seen, self._complaint = seen, ""
        return True

    async def watch(self) -> None:
        """Refresh for ever."""
        while True:
            await asyncio.sleep(POLL_S)
            if await asyncio.to_thread(self.refresh):
                _log.info("%d keys of %s", len(self.keyring.keys), self._path)


def read(path: Path) -> Keyring:
    """Raises ConfigError."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ConfigError(f"{path} must have at most {MAX_BYTES} bytes")
        return parse(content.decode())
    except OSError as error:
        raise ConfigError(f"cannot read the keys {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the keys {path} are not UTF-8") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def change(path: Path, edit: Callable[[Keyring], Keyring]) -> None:
    """Let `edit` make a new keyring of the file's, or of an empty one if there is no file, and write it.

    Changes by several at once follow each other. Raises ConfigError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f"{path.name}.lock")):
            keyring = edit(read(path) if path.exists() else Keyring())
            _replace(path, keyring.to_text())
    except OSError as error:
        raise ConfigError(f"cannot write the keys {path}: {error.strerror}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def _stamp(path: Path) -> tuple[int, int, int]:
    """Raises ConfigError."""
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"cannot read the keys {path}: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size, status.st_ino
