"""Sees to it that vLLM's processes end with this one, however that ends.

vLLM's engine does not notice that its front end was killed, and would keep its memory for ever. A guard is a small
process, this file run by itself. It looks at what starts below its owner, waits for the end of a pipe that only the
owner holds, and then kills those that are still there and removes their directory. It is nobody's child: a worker of
Ray's kills its own children when it ends.

    guarded -> looks every LOOK_S -> `all_started`: looks once more -> end of the scope, or of the owner: kills

An engine that nobody has seen, since its owner was killed before the next look, has not yet had an answer from it, and
gives up by itself within five minutes. Linux only: what runs is known by its number and the time of its start.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

LOOK_S: Final = 0.5
"""vLLM's engine imports for seconds before it says its first word."""


@contextlib.contextmanager
def guarded(directory: Path) -> Iterator[Callable[[], None]]:
    """What this process starts in the scope, and all below, ends with the scope at the latest, or with this process,
    and `directory` goes with it. Yields what is to be called once all of it has started; it blocks for a moment."""
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        start_new_session=True,
    )
    guard.wait()  # it knows what was there before, and has left another behind
    to_guard, from_guard = guard.stdin, guard.stdout
    assert to_guard is not None
    assert from_guard is not None

    def all_started() -> None:
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            to_guard.write(b".")
            from_guard.read(1)

    try:
        yield all_started
    finally:
        guard.communicate()  # until that one has closed its end of the pipe


def descendants(*pids: int) -> dict[int, str]:
    """Return the processes below these, by what the system says now, each with its start."""
    children: dict[int, list[tuple[int, str]]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))) is not None:
            children.setdefault(int(fields[1]), []).append((int(name), fields[19]))
    found: dict[int, str] = {}
    rest = list(pids)
    while rest:
        below = children.get(rest.pop(), [])
        found.update(below)
        rest += [pid for pid, _ in below]
    return found


def start_of(pid: int) -> str | None:
    """Return when a process started, in the system's ticks; None if there is none."""
    fields = _stat(pid)
    return None if fields is None else fields[19]


def kill(processes: dict[int, str]) -> None:
    """End those of these that are still there. A number that is another process by now is left alone."""
    for pid, start in processes.items():
        if start_of(pid) == start:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """Return what the system says of a process, from its state on."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:
            return file.read().rpartition(")")[2].split()
    except OSError:
        return None


def _guard(owner: int, directory: str) -> None:
    """Be the guard. Returns in a process of its own, when all is over."""
    before = descendants(owner)  # this process, too
    if os.fork():
        os._exit(0)
    found = descendants(owner)
    while not select.select([0], [], [], LOOK_S)[0]:
        found |= descendants(owner)
    if os.read(0, 1):
        found |= descendants(owner)
        with contextlib.suppress(BrokenPipeError):
            os.write(1, b".")
        os.read(0, 1)
    found |= descendants(owner, *(pid for pid, start in found.items() if start_of(pid) == start))
    found.pop(os.getpid(), None)  # where orphans come to its owner
    kill({pid: start for pid, start in found.items() if before.get(pid) != start})
    shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
