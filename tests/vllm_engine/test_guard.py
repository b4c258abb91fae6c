"""Processes that end with the one that guards them, whatever kills it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from workers.vllm_engine.guard import descendants, guarded, kill, start_of

SLEEPS = [sys.executable, "-c", "import time; time.sleep(60)"]
_GUARDS = """
import subprocess, sys, time
from pathlib import Path
from workers.vllm_engine.guard import guarded
begins = "import subprocess, sys, time; print(subprocess.Popen(%r).pid, flush=True); time.sleep(60)" % sys.argv[2:]
with guarded(Path(sys.argv[1])) as all_started:
    child = subprocess.Popen([sys.executable, "-c", begins])
    all_started()
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


def test_processes_and_a_directory_end_with_their_killed_guardian(tmp_path: Path) -> None:
    """The one that it has started, and what that one has started, whenever it did."""
    directory = tmp_path / "sockets"
    directory.mkdir()
    command = [sys.executable, "-c", _GUARDS, str(directory), *SLEEPS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guardian:
        assert guardian.stdout is not None
        family = {int(guardian.stdout.readline()), int(guardian.stdout.readline())}
        assert set(descendants(guardian.pid)) == family, "the guard is no child that Ray would kill"
        guardian.send_signal(signal.SIGKILL)
    assert all(ends(pid) for pid in family)
    end = time.monotonic() + 10
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not directory.exists()


def test_what_has_started_in_the_scope_ends_with_it_and_nothing_else(tmp_path: Path) -> None:
    with subprocess.Popen(SLEEPS) as before:
        with guarded(tmp_path) as all_started:
            first = subprocess.Popen(SLEEPS)
            all_started()
            second = subprocess.Popen(SLEEPS)
            assert {first.pid, second.pid, before.pid} <= set(descendants(os.getpid()))
        assert (first.wait(10), second.wait(10)) == (-signal.SIGKILL, -signal.SIGKILL)
        assert before.poll() is None
        before.kill()


def test_a_guard_that_was_killed_keeps_nobody_from_starting(tmp_path: Path) -> None:
    with guarded(tmp_path) as all_started:
        mark = str(tmp_path).encode()
        (guard,) = (pid for pid in every_process() if mark in command_of(pid))
        os.kill(guard, signal.SIGKILL)
        all_started()
        all_started()


def test_a_number_that_is_another_process_now_is_left_alone() -> None:
    with subprocess.Popen(SLEEPS) as child:
        start = start_of(child.pid)
        assert start is not None
        kill({child.pid: start + "0"})
        assert child.poll() is None
        kill({child.pid: start})
        assert child.wait(10) == -signal.SIGKILL
    assert start_of(child.pid) is None
    kill({child.pid: start})


def every_process() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
