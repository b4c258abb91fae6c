"""A bench that adds to an earlier one reads the same figures that were written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from load_tests.measurement import Measurement
from load_tests.peers.earlier import EarlierError, read_earlier
from load_tests.peers.runs import Run

MACHINE = {"processor": "p", "cores": 2, "memory_gb": 8.0, "instructions": ["avx2"]}
RUN = Run(
    contestant="a",
    family="A",
    repetition=0,
    began="2026-01-01 00:00",
    load_before=0.1,
    busy_before=0.0,
    cpu_s={"single": {"engine": 1.0, "others": 0.1, "driver": 0.1}},
    measurements=(
        Measurement(
            workload="single",
            requests=4,
            wall_s=1.0,
            output_tokens_per_s=2.0,
            requests_per_s=3.0,
            first_token_p50_ms=4.0,
            first_token_max_ms=5.0,
            per_token_p50_ms=6.0,
            cached_tokens=None,
        ),
    ),
)


def written(path: Path, **changes: Any) -> Path:
    report = {
        "machine": MACHINE,
        "is_smoke": False,
        "runs": [dataclasses.asdict(RUN), dataclasses.asdict(dataclasses.replace(RUN, contestant="b"))],
        "verdicts": {"a": [{"num_wrong": 0}], "b": []},
        "perplexity_increase": {"bf16": 0.0},
        "starts": {"later": {"seconds": 1.0}},
    }
    path.write_text(json.dumps({**report, **changes}))
    return path


def test_reads_back_what_was_written(tmp_path: Path) -> None:
    earlier = read_earlier(written(tmp_path / "runs.json"), MACHINE)
    assert earlier.runs == (RUN, dataclasses.replace(RUN, contestant="b"))
    assert earlier.starts == {"later": {"seconds": 1.0}}


def test_leaves_out_who_is_measured_anew(tmp_path: Path) -> None:
    earlier = read_earlier(written(tmp_path / "runs.json"), MACHINE).without({"a"})
    assert [run.contestant for run in earlier.runs] == ["b"]
    assert list(earlier.verdicts) == ["b"]
    assert earlier.perplexity_increase == {"bf16": 0.0}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_smoke": True}, "smoke"),
        ({"machine": {**MACHINE, "instructions": ["avx512f"]}}, "another machine: instructions"),
        ({"runs": [{"contestant": "a"}]}, "not the report"),
        ({"runs": None}, "not the report"),
        ({"runs": ["a"]}, "not the report"),
        ({"machine": None}, "not the report"),
    ],
)
def test_refuses_what_cannot_be_compared(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(EarlierError, match=reason):
        read_earlier(written(tmp_path / "runs.json", **changes), MACHINE)


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(EarlierError, match="not the report"):
        read_earlier(tmp_path / "runs.json", MACHINE)
