"""The peak memory of a server from its start on, sampled in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Collection
from types import TracebackType
from typing import Self

from load_tests import process_tree

START_PERIOD_S = 0.25
LOAD_PERIOD_S = 2.0
"""Under load a sample, which walks page tables for some milliseconds, must cost less than a percent."""


class MemoryWatch:
    """Used as ``with MemoryWatch(pid) as watch``; `pid` is the root of a server's processes, peaks are PSS in bytes."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._period_s = START_PERIOD_S
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)
        self._peaks: dict[int, int] = {}
        self.peak_tree = 0
        """Of all processes at the same moment."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def calm_down(self) -> None:
        """The server is ready: sample seldom from now on."""
        self._period_s = LOAD_PERIOD_S

    def sample(self) -> None:
        """Look now, too; for the end of a load, while the processes are still there."""
        sizes = {process.pid: process_tree.pss_bytes(process.pid) for process in process_tree.tree(self._pid)}
        self.peak_tree = max(self.peak_tree, sum(sizes.values()))
        for pid, size in sizes.items():
            self._peaks[pid] = max(self._peaks.get(pid, 0), size)

    def peak_of(self, pids: Collection[int]) -> int:
        """Return the peak of the largest of these processes; of none, that of the tree."""
        return max((self._peaks.get(pid, 0) for pid in pids), default=self.peak_tree)

    def _run(self) -> None:
        while not self._stop.wait(self._period_s):
            self.sample()
