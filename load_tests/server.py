"""A server under test as a child process: started, awaited, watched, ended by its pid, and nothing of it left."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from load_tests import process_tree
from load_tests.memory_watch import MemoryWatch

STOP_TIMEOUT_S = 60.0
END_TIMEOUT_S = 10.0
"""For the end of what was killed, and of what a server started, after its own end."""
POLL_S = 0.1
OURS = ("OCTAVO_", "OTEL_", "RAY_")
"""Variables of the surrounding shell that a contestant does not see."""


class ServerError(Exception):
    """A server did not get ready; the message says why, with the end of its log."""


class ServerProcess:
    def __init__(self, command: Sequence[str], variables: Mapping[str, str], log: Path) -> None:
        """Start `command`, its output in `log`; `stop` must be called next, whatever happens."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
        self.log = log
        self.begun = time.perf_counter()
        self.begun_at = time.time()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**kept, **variables},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def check_alive(self) -> None:
        """Raises ServerError."""
        if self._process.poll() is not None:
            raise ServerError(f"ended with code {self._process.returncode}: {self._last_words()}")

    def await_line(self, start: str, timeout_s: float) -> str:
        """Return the first whole line of its output that begins with `start`. Raises ServerError."""
        for _ in self._until(timeout_s):
            for line in self.said().splitlines(keepends=True):
                if line.startswith(start) and line.endswith("\n"):
                    return line
        raise ServerError(f"not ready after {timeout_s:.0f} s: {self._last_words()}")

    def await_text(self, text: str, timeout_s: float) -> None:
        """Return when its output has `text` in it. Raises ServerError."""
        for _ in self._until(timeout_s):
            if text in self.said():
                return
        raise ServerError(f"not ready after {timeout_s:.0f} s: {self._last_words()}")

    def await_http(self, url: str, timeout_s: float) -> None:
        """Return when `url` answers 200. Raises ServerError."""
        for _ in self._until(timeout_s):
            with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        raise ServerError(f"not ready after {timeout_s:.0f} s: {self._last_words()}")

    def stop(self) -> None:
        """Send SIGTERM and wait; kill what is left of its processes after that, at once if a signal says to hurry.

        A signal may come at any line, and with it an exception: also then the process is killed, and every wait has a
        limit, since an exception in the middle of `Popen.poll` leaves its lock taken.
        """
        family: list[process_tree.Process] = []
        try:
            family = process_tree.tree(self.pid)
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_TIMEOUT_S)
        finally:
            if self._process.poll() is None:
                family = process_tree.tree(self.pid)
                self._process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_TIMEOUT_S)
            process_tree.await_end(family, END_TIMEOUT_S)

    def _until(self, timeout_s: float) -> Iterator[None]:
        give_up = time.perf_counter() + timeout_s
        while time.perf_counter() < give_up:
            self.check_alive()
            yield
            time.sleep(POLL_S)

    def _last_words(self) -> str:
        return " | ".join(self.said().strip().splitlines()[-3:])[-600:] or "it said nothing"


@contextmanager
def watched(
    command: Sequence[str], variables: Mapping[str, str], log: Path
) -> Iterator[tuple[ServerProcess, MemoryWatch]]:
    """Run a server for the scope, its memory being watched."""
    server = ServerProcess(command, variables, log)
    try:
        with MemoryWatch(server.pid) as watch:
            yield server, watch
    finally:
        server.stop()


def end_on_sigterm() -> None:
    """From now on SIGTERM ends this process as Ctrl-C does, scope by scope, so that no server is left behind."""
    signal.signal(signal.SIGTERM, _end)


def _end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def free_port() -> int:
    """Return a port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
