"""Servers as child processes: awaited, watched, ended with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from load_tests import machine, process_tree
from load_tests.processor_time import ProcessorTime
from load_tests.server import ServerError, ServerProcess, watched

PARENT = """
import subprocess, sys, time
block = bytearray(64 << 20)
for start in range(0, len(block), 4096):
    block[start] = 1
child = subprocess.Popen([sys.executable, "-c", "import time; print('child', flush=True); time.sleep(600)"])
print("ready", child.pid, flush=True)
time.sleep(600)
"""


def test_a_server_is_awaited_watched_and_ended(tmp_path: Path) -> None:
    with watched([sys.executable, "-c", PARENT], {}, tmp_path / "log") as (server, watch):
        child = int(server.await_line("ready", 60.0).split()[1])
        watch.sample()
        family = process_tree.tree(server.pid)
        assert {process.pid for process in family} == {server.pid, child}
        assert watch.peak_tree > watch.peak_of([server.pid]) > 64 << 20
        assert watch.peak_of([]) == watch.peak_tree
        assert process_tree.cpu_s(server.pid) >= 0
        assert process_tree.thread_times_s(os.getpid())[os.getpid()] > 0
    assert process_tree.tree(server.pid) == []
    assert process_tree.tree(child) == []


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('no such instruction'); sys.exit(3)"]
    with (
        pytest.raises(ServerError, match="ended with code 3: no such instruction"),
        watched(command, {}, tmp_path / "log") as (server, _),
    ):
        server.await_line("ready", 60.0)


def test_a_server_that_is_never_ready(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(ServerError, match="not ready after 0 s: it said nothing"),
        watched(command, {}, tmp_path / "log") as (server, _),
    ):
        server.await_http("http://127.0.0.1:1/health", 0.3)


def test_what_has_ended_has_nothing() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert process_tree.tree(child.pid) == []
    assert process_tree.pss_bytes(child.pid) == 0
    assert process_tree.cpu_s(child.pid) == 0.0
    assert process_tree.thread_times_s(child.pid) == {}


def test_processor_time_is_that_of_the_busiest_threads() -> None:
    spent = ProcessorTime(os.getpid(), [os.getpid()], engine_threads=1)
    end = time.thread_time() + 0.1
    while time.thread_time() < end:
        pass
    seconds = spent.seconds()
    assert seconds["engine"] >= 0.05
    assert seconds["driver"] >= 0.1
    assert ProcessorTime(os.getpid(), [], engine_threads=1).seconds()["engine"] == 0.0


def test_the_machine_is_described() -> None:
    said = machine.describe()
    assert said["cores"] == len({*range(said["cores"])})  # type: ignore[misc, call-overload]
    assert machine.busy_cores(0.05) >= 0


def test_a_signal_at_the_beginning_of_the_end_leaves_no_server_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second one came while the processes were looked for, and nobody ended them."""
    server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path / "log")

    def interrupted(pid: int) -> list[process_tree.Process]:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(process_tree, "tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        server.stop()
    assert process_tree.tree(server.pid) == []


def test_a_poll_that_was_interrupted_does_not_hold_up_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception between taking the lock of a Popen and the `try` after it leaves it taken: the end was waited for
    without a limit, and by nobody else."""
    monkeypatch.setattr("load_tests.server.STOP_TIMEOUT_S", 0.1)
    monkeypatch.setattr("load_tests.server.END_TIMEOUT_S", 1.0)
    server = ServerProcess([sys.executable, "-c", "import time; time.sleep(600)"], {}, tmp_path / "log")
    lock = server._process._waitpid_lock  # type: ignore[attr-defined]
    with lock:
        server.stop()
    assert process_tree.tree(server.pid) == []
    assert server._process.wait() < 0


MAIN = """
import importlib, sys
sys.executable, module = sys.argv[1:3]
sys.argv = sys.argv[2:]
importlib.import_module(module).main()
"""
STUBBORN = """#!/bin/sh
trap '' TERM
sleep 0.2
echo $$ >"$(dirname "$0")/pid"
exec sleep 60
"""
"""Says who it is when whoever started it knows of it, too: between the two a signal leaves it behind."""


@contextmanager
def running(folder: Path, code: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A program for the scope. If it has not ended by then, it says where it was, and is ended with its server."""
    log = folder / "stderr"
    with log.open("wb") as said:
        command = [sys.executable, "-X", "faulthandler", "-c", code, *arguments]
        program = subprocess.Popen(command, stderr=said)
    try:
        yield program
    finally:
        for number in (signal.SIGABRT, signal.SIGKILL):
            if program.poll() is None:
                program.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    program.wait(10)
        if (folder / "pid").exists():
            process_tree.await_end(process_tree.tree(int((folder / "pid").read_text() or 0)), 0.0)
        sys.stdout.write(log.read_text(errors="replace"))


@pytest.mark.parametrize("module", ["load_tests.bench", "load_tests.startup"])
def test_a_bench_that_is_told_to_end_leaves_no_server_behind(tmp_path: Path, module: str) -> None:
    """SIGTERM ended the bench and nothing else: its server lives in a session of its own."""
    for name in ("python", "octavo"):
        (tmp_path / name).write_text(STUBBORN)
        (tmp_path / name).chmod(0o755)
    with running(tmp_path, MAIN, str(tmp_path / "python"), module, "--model", "default") as bench:
        server = _pid_in(tmp_path / "pid", bench)
        bench.terminate()
        time.sleep(0.2)
        bench.send_signal(signal.SIGINT)  # a second signal says that there is no time to wait for it
        assert bench.wait(30) != 0
        assert process_tree.tree(server) == []


ASK = """
import sys
from load_tests.peers.bench import output_of
from load_tests.server import end_on_sigterm
sys.executable = sys.argv[1]
end_on_sigterm()
output_of("startup")
"""
ORDERLY = """#!/bin/sh
trap 'sleep 1; touch "$(dirname "$0")/ended"; exit 0' TERM
sleep 0.2
echo $$ >"$(dirname "$0")/pid"
while :; do sleep 0.1; done
"""


def test_a_program_of_a_bench_gets_the_time_to_end_its_own_servers(tmp_path: Path) -> None:
    """One that is killed leaves them behind."""
    (tmp_path / "python").write_text(ORDERLY)
    (tmp_path / "python").chmod(0o755)
    with running(tmp_path, ASK, str(tmp_path / "python")) as bench:
        program = _pid_in(tmp_path / "pid", bench)
        bench.terminate()
        assert bench.wait(30) == 128 + signal.SIGTERM
        assert (tmp_path / "ended").exists()
        assert process_tree.tree(program) == []


def _pid_in(path: Path, program: subprocess.Popen[bytes]) -> int:
    """Return what the server of `program` has written there."""
    while not path.exists() or not path.read_text():
        assert program.poll() is None, "it ended before it had started a server"
        time.sleep(0.05)
    return int(path.read_text())
