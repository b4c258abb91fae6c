"""The rungs between a bare engine and a cluster, over a device that is a clock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from load_tests.rigs import gpu_ladder


def test_every_rung_computes_the_same_kind_of_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of one rung were in the cache for the next, which then had no step with a prompt in it."""
    monkeypatch.setattr(gpu_ladder, "WARM_UP_S", 0.5)
    assert gpu_ladder.main(["--out", str(tmp_path / "ladder.json"), "--clock", "--duration", "0.6"]) == 0
    report = json.loads((tmp_path / "ladder.json").read_text())
    for rung in ("hand", "thread", "port"):
        assert report[rung]["tokens_per_s"] > 1_000
        assert 150 < report[rung]["rows"] <= 256
        assert 0.1 < report[rung]["mixed"] < 1
    assert report["port"]["messages_per_s"] > 5
