"""A process that is attached to the Ray of a running `octavo serve` and does there what it is asked.

it     python -m MODULE RAY_ADDRESS: says "attached", then a number for each line that it reads, a number as well
here   `attached` runs it for a scope, `ask` blocks until it has answered
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from load_tests.rigs.router_rig import ROOT

STOP_S = 20.0


class AttachedProcess:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._hear() == "attached"

    def ask(self, number: int) -> int:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{number}\n")
        self._process.stdin.flush()
        return int(self._hear())

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def attached(module: str, ray_address: str, variables: Mapping[str, str]) -> Iterator[AttachedProcess]:
    """One for the scope; `variables` are what that Ray was started with."""
    set_to = [f"{name}={value}" for name, value in variables.items()]
    process = subprocess.Popen(
        ["env", *set_to, sys.executable, "-m", module, ray_address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield AttachedProcess(process)
    finally:
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):  # it ended before it read all
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
