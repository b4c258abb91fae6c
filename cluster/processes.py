"""The processes that a Ray of our own started: remembered while it runs, waited for and, if need be, killed at its end.

Ray ends them by itself within a second or two; a command that says "nothing is left" must wait for that. Linux only:
elsewhere nothing is remembered and Ray's own word is taken.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")
POLL_S = 0.02


class Process(NamedTuple):
    """A pid and when it began, in clock ticks since the machine's start: together they are never used twice."""

    pid: int
    began: int


def descendants(pid: int) -> set[Process]:
    """Return the children of process `pid`, their children, and so on."""
    parents: dict[Process, int] = {}
    for directory in _PROC.glob("[0-9]*"):
        found = _look(int(directory.name))
        if found is not None:
            parents[found[0]] = found[1]
    family, size = {pid}, 0
    while len(family) != size:
        size = len(family)
        family |= {process.pid for process, parent in parents.items() if parent in family}
    return {process for process in parents if process.pid in family and process.pid != pid}


def await_end(processes: set[Process], timeout_s: float) -> set[Process]:
    """Wait until all of them have ended, kill those that have not after `timeout_s`, and return these."""
    end = time.monotonic() + timeout_s
    while (alive := {process for process in processes if _is_alive(process)}) and time.monotonic() < end:
        time.sleep(POLL_S)
    for process in alive:
        try:
            os.kill(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return alive


def _is_alive(process: Process) -> bool:
    found = _look(process.pid)
    return found is not None and found[0] == process


def _look(pid: int) -> tuple[Process, int] | None:
    """Return a process that has not ended and the pid of its parent."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # The command in parentheses may contain anything, also spaces and parentheses.
    state, parent, *rest = text[text.rindex(")") + 2 :].split()
    return None if state == "Z" else (Process(pid, int(rest[17])), int(parent))
