"""Sees to it that vLLM's processes end with this one, however that ends.

vLLM's engine does not notice that its front end was killed, and would keep its memory for ever. A guard is a small
process that waits for the end of a pipe which only this process holds, and then kills those that are still there and
removes their directory. It is nobody's child: a worker of Ray's kills its own children when it ends.
Linux only: what runs is known by its number and the time of its start.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_GUARD = """
import os, shutil, signal, sys
if os.fork():
    os._exit(0)
sys.stdin.buffer.read()
for pid, start in zip(sys.argv[2::2], sys.argv[3::2]):
    try:
        with open(f"/proc/{pid}/stat") as file:
            if file.read().rpartition(")")[2].split()[19] == start:
                os.kill(int(pid), signal.SIGKILL)
    except (OSError, IndexError):
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


@contextmanager
def guarded(pids: list[int], directory: Path) -> Iterator[None]:
    """These processes end with the scope at the latest, or with this process, and `directory` goes with them."""
    known = [(str(pid), start) for pid in pids if (start := start_of(pid)) is not None]
    arguments = [part for pair in known for part in pair]
    guard = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _GUARD, str(directory), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    guard.wait()  # it has left another behind
    try:
        yield
    finally:
        guard.communicate()  # until that one has closed its end of the pipe


def descendants(pid: int) -> list[int]:
    """Return the processes below one, by what the system says now."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
    found, rest = [], [pid]
    while rest:
        parent = rest.pop()
        below = [child for child, above in parents.items() if above == parent]
        found += below
        rest += below
    return found


def start_of(pid: int) -> str | None:
    """Return when a process started, in the system's ticks; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
