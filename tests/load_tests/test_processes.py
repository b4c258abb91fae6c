"""Servers as child processes: awaited, watched, ended with all that they started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from load_tests import machine, process_tree
from load_tests.server import ServerError, watched

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


def test_the_machine_is_described() -> None:
    said = machine.describe()
    assert said["cores"] == len({*range(said["cores"])})  # type: ignore[misc, call-overload]
    assert machine.busy_cores(0.05) >= 0
