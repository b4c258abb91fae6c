"""`octavo models pull` and `octavo models list`, as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli_models import app


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


@pytest.fixture(autouse=True)
def own_cache(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_CACHE_DIR", str(cache_dir))


def test_a_pulled_model_is_described_and_listed(write_gguf, cache_dir: Path):
    assert run("list") == ""
    path = write_gguf()
    text = run("pull", str(path))
    assert "llama, gguf, context 64, vocabulary 267, licence mit" in text
    assert f"weights: {path}" in text
    pulled = json.loads(run("pull", str(path), "--json"))
    assert pulled["files"]["weights"] == str(path)
    assert pulled["manifest"]["eos_token_ids"] == [2, 0]
    assert "tiny: llama, gguf" in run("list")
    listed = [json.loads(line) for line in run("list", "--json").splitlines()]
    assert [entry["manifest"] for entry in listed] == [pulled["manifest"]]
    assert Path(listed[0]["path"]).is_relative_to(cache_dir)


def test_a_broken_model_ends_with_exit_code_3(tmp_path: Path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and nothing else of use")
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "models", "pull", str(path)],
        cwd=Path(__file__).resolve().parents[2],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout == ""
    assert "broken.gguf: " in done.stderr
    assert "Traceback" not in done.stderr
