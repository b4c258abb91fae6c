"""Processes that end with the one that guards them, whatever kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from workers.vllm_engine.guard import descendants, guarded, start_of

_SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]
_GUARDS = """
import subprocess, sys, time
from pathlib import Path
from workers.vllm_engine.guard import guarded
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with guarded([child.pid], Path(sys.argv[1])):
    print(child.pid, flush=True)
    time.sleep(60)
"""


def ends(pid: int) -> bool:
    """Whether a process is gone, or a zombie that nobody has fetched, within a few seconds."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except FileNotFoundError:
            return True
        time.sleep(0.02)
    return False


def test_a_process_and_a_directory_end_with_their_killed_guardian(tmp_path: Path) -> None:
    directory = tmp_path / "sockets"
    directory.mkdir()
    command = [sys.executable, "-c", _GUARDS, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guardian:
        assert guardian.stdout is not None
        child = int(guardian.stdout.readline())
        assert start_of(child) is not None
        assert descendants(guardian.pid) == [child], "the guard is no child that Ray would kill"
        guardian.send_signal(signal.SIGKILL)
    assert ends(child)
    end = time.monotonic() + 10
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not directory.exists()


def test_a_process_ends_with_the_scope(tmp_path: Path) -> None:
    with subprocess.Popen(_SLEEPS) as child:
        with guarded([child.pid], tmp_path):
            assert child.poll() is None
            assert child.pid in descendants(os.getpid())
        assert child.wait(10) == -signal.SIGKILL


def test_a_number_that_is_another_process_now_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(_SLEEPS) as gone:
        gone.kill()
    assert start_of(gone.pid) is None
    with guarded([gone.pid], tmp_path):
        pass
