"""A process and all that it started, read from /proc: which they are, how much memory and processor time they took.

Memory is PSS: pages that several processes share count once, divided among them. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_POLL_S = 0.05


class Process(NamedTuple):
    """A pid and when it began, in clock ticks since the machine's start: together they are never used twice."""

    pid: int
    began: int


def tree(pid: int) -> list[Process]:
    """Return `pid`, its children, their children and so on, as far as they have not ended."""
    children: dict[int, list[Process]] = {}
    root: list[Process] = []
    for directory in _PROC.glob("[0-9]*"):
        found = _look(int(directory.name))
        if found is not None:
            process, parent = found
            children.setdefault(parent, []).append(process)
            if process.pid == pid:
                root.append(process)
    family = root
    for process in family:
        family += children.get(process.pid, [])
    return family


def pss_bytes(pid: int) -> int:
    """Return the PSS of one process; 0 if it has ended."""
    try:
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def cpu_s(pid: int) -> float:
    """Return the processor time that a process took so far, its threads together; 0 if it has ended."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S if fields else 0.0


def started_s_ago(process: Process) -> float:
    """Return how long ago a process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.began / _TICKS_PER_S


def thread_times_s(pid: int) -> dict[int, float]:
    """Return the processor time so far of each thread of a process, by its number; nothing if it has ended."""
    times = {}
    for task in (_PROC / str(pid) / "task").glob("[0-9]*"):
        fields = _stat_at(task)
        if fields is not None:
            times[int(task.name)] = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return times


def await_end(processes: list[Process], timeout_s: float) -> None:
    """Wait until all of them have ended; kill those that have not after `timeout_s`."""
    give_up = time.monotonic() + timeout_s
    while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < give_up:
        time.sleep(_POLL_S)
    for process in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def _is_alive(process: Process) -> bool:
    found = _look(process.pid)
    return found is not None and found[0] == process


def _look(pid: int) -> tuple[Process, int] | None:
    """Return a process that has not ended and the pid of its parent."""
    fields = _stat(pid)
    return None if fields is None or fields[0] == "Z" else (Process(pid, int(fields[19])), int(fields[1]))


def _stat(pid: int) -> list[str] | None:
    return _stat_at(_PROC / str(pid))


def _stat_at(directory: Path) -> list[str] | None:
    """Return what `stat` there says after the command, which may contain anything; None if process or thread ended."""
    try:
        return (directory / "stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return None
