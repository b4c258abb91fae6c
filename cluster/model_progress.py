"""How a fetch tells a human what it is doing. Knows no models."""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol

log = logging.getLogger("octavo.models")


class Progress(Protocol):
    """Told by a fetch, in this order: notes at any time, then one `begin`, growing `reached`, one `end`."""

    def note(self, text: str) -> None: ...

    def begin(self, label: str, total_bytes: int) -> None: ...

    def reached(self, num_bytes: int) -> None: ...

    def end(self) -> None: ...


def for_process() -> Progress:
    """Return a bar when a human watches stderr, and log lines otherwise."""
    return TerminalProgress() if sys.stderr.isatty() else LogProgress()


class LogProgress:
    def note(self, text: str) -> None:
        log.info("%s", text)

    def begin(self, label: str, total_bytes: int) -> None:
        log.info("fetching %s (%.0f MB)", label, total_bytes / 1e6)

    def reached(self, num_bytes: int) -> None:
        pass

    def end(self) -> None:
        log.info("fetched")


class TerminalProgress:
    """A bar on stderr; plain lines when stderr is no terminal."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def begin(self, label: str, total_bytes: int) -> None:
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        if not self._console.is_terminal:
            self.note(f"fetching {label} ({total_bytes / 1e6:.0f} MB)")
            return
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task(label, total=total_bytes)
        self._bar.start()

    def reached(self, num_bytes: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=num_bytes)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
