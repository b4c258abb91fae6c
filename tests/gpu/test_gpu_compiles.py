"""Kernels compile for a Hopper GPU. In all other tests they are interpreted, which forgives what no compiler does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed; it is part of the dev extra")

ROOT = Path(__file__).parents[2]
KERNELS = {"_embed", "_add_norm", "_gate", "_rotate_store", "_attend", "_project", "_take_largest", "_draw"}


def test_all_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu.compiled_kernels"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) == KERNELS
