"""`octavo serve` as a child process, for tests: started, awaited, ended by pid, and nothing of it left.

Every process of a cluster carries a mark of its own in its environment, which Ray hands down; that is how leftovers are
found without looking at anybody else's processes.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MARK = "CLUSTER_UNDER_TEST"
START_TIMEOUT_S = 100.0
STOP_TIMEOUT_S = 60.0
END_TIMEOUT_S = 30.0


class ClusterProcess:
    """A command that runs a cluster; `ready` is the line that it printed."""

    def __init__(self, arguments: list[str], variables: Mapping[str, str]) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="oct", dir="/tmp"))
        self.mark = uuid.uuid4().hex
        self._files = [(self.directory / name).open("w") for name in ("stdout", "stderr")]
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "OCTAVO_"))},
            **{name: os.environ[name] for name in ("OCTAVO_CACHE_DIR",) if name in os.environ},
            "RAY_AUTH_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
            **variables,
        }
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env=environment,
            cwd=self.directory,
            stdout=self._files[0],
            stderr=self._files[1],
            start_new_session=True,
        )
        self.ready: dict[str, Any] = {}
        self._is_told_to_end = False

    @classmethod
    def serve(cls, *options: str, **variables: str) -> ClusterProcess:
        """Start `octavo serve` on a free port with a short temporary directory; `await_ready` next."""
        return cls(["-m", "cluster.cli", "serve", "--port", "0", *options], variables)

    @property
    def address(self) -> str:
        return str(self.ready["address"])

    @property
    def pids(self) -> list[int]:
        """The replicas that were there when the cluster got ready."""
        return [int(replica["pid"]) for replica in self.ready["replicas"]]

    def await_ready(self, timeout_s: float = START_TIMEOUT_S) -> ClusterProcess:
        end = time.monotonic() + timeout_s
        while not (line := (self.directory / "stdout").read_text()).endswith("\n"):
            assert self.process.poll() is None, f"it ended with {self.process.returncode}:\n{self.errors()}"
            assert time.monotonic() < end, f"it is not ready:\n{self.errors()}"
            time.sleep(0.05)
        self.ready = json.loads(line)
        assert self.ready["event"] == "ready"
        return self

    def errors(self) -> str:
        """Return what it wrote for people."""
        return (self.directory / "stderr").read_text()

    def signal(self, number: int = signal.SIGTERM) -> None:
        self._is_told_to_end = True
        self.process.send_signal(number)

    def await_exit(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> int:
        """End it as a user would, unless it was told already; return its exit code. No process of it may be left."""
        try:
            if self.process.poll() is None and not self._is_told_to_end:
                self.signal()
            code = self.await_exit()
            if code != 0:
                sys.stderr.write(self.errors())
            left = self.left()
            assert left == {}, f"left behind: {left}"
            return code
        finally:
            self.clean_up()

    def left(self) -> dict[int, str]:
        """Return the processes of this cluster that are there after a moment, with their commands."""
        end = time.monotonic() + END_TIMEOUT_S
        while (alive := marked(self.mark)) and time.monotonic() < end:
            time.sleep(0.05)
        return alive

    def clean_up(self) -> None:
        """Kill what a failed test left, and remove the directory."""
        for pid in (self.process.pid, *marked(self.mark)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        for file in self._files:
            file.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def marked(mark: str) -> dict[int, str]:
    """Return the live processes that carry `mark`, with their commands."""
    found = {}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (directory / "environ").read_bytes():
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(directory.name)] = command[:120]
    return found


@contextlib.contextmanager
def running(*options: str, **variables: str) -> Iterator[ClusterProcess]:
    """A cluster that is ready; it must end with exit code 0 and leave nothing."""
    cluster = ClusterProcess.serve(*options, **variables)
    try:
        cluster.await_ready()
        yield cluster
        assert cluster.stop() == 0
    finally:
        cluster.clean_up()
