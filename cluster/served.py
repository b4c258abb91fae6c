"""`octavo serve` as a child process: started, awaited by its ready line, ended, and nothing of it left.

The child is a session of its own, so that a Ctrl-C in the terminal reaches its owner alone, who then ends it in order.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

from cluster.processes import await_end, descendants
from workers.errors import StartupError

STOP_TIMEOUT_S = 60.0
LEFTOVER_TIMEOUT_S = 5.0
ERROR_LINES = 15
NO_VARIABLES: Mapping[str, str] = {}


class ServeFailedError(StartupError):
    """The child ended before it was ready, with `child_exit_code`."""

    def __init__(self, message: str, child_exit_code: int) -> None:
        super().__init__(message)
        self.child_exit_code = child_exit_code


@dataclass(frozen=True, slots=True)
class Served:
    """A cluster that is ready."""

    address: str
    pid: int
    ready: dict[str, Any]
    """The ready line."""


@contextmanager
def served(
    options: Sequence[str],
    *,
    timeout_s: float,
    note: Callable[[str], None],
    variables: Mapping[str, str] = NO_VARIABLES,
) -> Iterator[Served]:
    """Run `octavo serve` with `options` for the scope, and `variables` over this process's own environment.
    `note` gets what it says while it starts.

    Raises ServeFailedError when it does not get ready, StartupError when something of it had to be killed at the end.
    """
    command = [sys.executable, "-m", "cluster.cli", "serve", *options]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            yield _await_ready(child, errors, timeout_s, note)
        except BaseException:
            _stop(child)
            raise
        left = _stop(child)
        if left:
            raise StartupError(f"the cluster left {left} processes behind, which were killed")
        if child.returncode != 0:
            raise StartupError(f"the cluster ended with code {child.returncode}: {_tail(errors)}")


def _await_ready(
    child: subprocess.Popen[str], errors: IO[str], timeout_s: float, note: Callable[[str], None]
) -> Served:
    lines: queue.Queue[str] = queue.Queue()
    assert child.stdout is not None
    threading.Thread(target=_read_lines, args=(child.stdout, lines), daemon=True).start()
    give_up = time.monotonic() + timeout_s
    num_read = 0
    while True:
        try:
            line = lines.get(timeout=0.1)
        except queue.Empty:
            line = ""
        else:
            if line.startswith("{"):
                ready = json.loads(line)
                return Served(str(ready["address"]), int(ready["pid"]), ready)
            child.wait(STOP_TIMEOUT_S)  # its stdout is closed, or holds what no version of `octavo serve` prints
        text = _read(errors)
        complete = text.rpartition("\n")[0].splitlines()
        for said in complete[num_read:]:
            note(said.removeprefix("octavo: "))
        num_read = len(complete)
        if child.poll() is not None:
            raise ServeFailedError(f"the cluster did not start: {_tail(errors)}", child.returncode)
        if time.monotonic() > give_up:
            raise StartupError(f"the cluster was not ready after {timeout_s:.0f} s: {_tail(errors)}")


def _read_lines(stream: IO[str], lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _read(errors: IO[str]) -> str:
    return os.pread(errors.fileno(), 1 << 20, 0).decode(errors="replace")


def _tail(errors: IO[str]) -> str:
    lines = _read(errors).strip().splitlines()
    return "\n".join(lines[-ERROR_LINES:]) or "it said nothing"


def _stop(child: subprocess.Popen[str]) -> int:
    """End `child` as a user would, and return how many of its processes had to be killed."""
    family = descendants(child.pid)
    try:
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            child.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        family |= descendants(child.pid)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()
        left = await_end(family, LEFTOVER_TIMEOUT_S)
    return len(left)
