"""The real thing, for a few seconds: the command line, its processes, a bare router and fake replicas over gRPC."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.v1.status_service_pb2 import GetStatusRequest
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

from load_tests.__main__ import main
from load_tests.rigs.router_clock import TICKS_PER_S
from load_tests.rigs.router_model import RIG_WORDS
from load_tests.rigs.router_rig import ROOT, RigConfig, RouterRig

SCENARIO = f"""
name = "everything"
about = "A bit of each."
processes = 2
thresholds = ["errors == 0", "late == 0", "refused >= 1", "cancelled >= 1", "cached_share > 0.1"]

[arrivals]
process = "poisson"
rate = 60
duration_s = 1.0

[clock]
first = {RIG_WORDS.start}
ticks = {len(RIG_WORDS)}
ticks_per_s = {TICKS_PER_S}

[[kinds]]
name = "chat"
weight = 4
output = 8
prompt = {{ system = 64, own = 8 }}
turns = [1, 2]
timeout_s = 30

[[kinds]]
name = "hasty"
cancel_share = 1.0
cancel_after_s = [0, 0.02]
output = 200

[[kinds]]
name = "slow_reader"
read_pause_s = 0.01
output = 8
prompt = {{ form = "messages" }}

[[kinds]]
name = "bad"
poisons = ["empty_prompt", "token_out_of_range", "max_tokens_zero", "top_p_above_one", "unknown_model"]
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[RouterRig]:
    with RouterRig(RigConfig(replicas=2, step_s=0.002, num_blocks=1_024, tells_time=True)) as rig:
        pids = rig.pids
        yield rig
    assert not [pid for pid in pids.values() if is_alive(pid)]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "everything.toml"
    file.write_text(SCENARIO)
    return file


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def load_tests(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "load_tests", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)


def report_in(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return report


@pytest.mark.parametrize("call", ["session", "generate"])
def test_a_run_ends_each_request_once_and_leaves_its_reports(
    rig: RouterRig, scenario: Path, tmp_path: Path, call: str
) -> None:
    out = tmp_path / "out"
    done = load_tests("run", scenario, "--target", rig.address, "--out", out, "--call", call)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    report = report_in(out)
    every = report["tally"]["all"]
    assert every["sent"] == every["ok"] + every["cancelled"] + every["refused"] > 30
    assert report["tally"]["kinds"]["bad"]["refused"] == report["tally"]["kinds"]["bad"]["sent"]
    assert set(report["tally"]["replicas"]) >= {"replica-0", "replica-1"}
    assert report["figures"]["age_s.p50"] < 6
    assert (out / "report.txt").read_text() == done.stdout
    assert "</html>" in (out / "report.html").read_text()
    same = load_tests("compare", out, out)
    assert same.returncode == 0, same.stdout + same.stderr


def test_a_broken_threshold_is_exit_code_1(rig: RouterRig, scenario: Path, tmp_path: Path) -> None:
    scenario.write_text(scenario.read_text().replace("refused >= 1", "refused == 0"))
    done = load_tests("run", scenario, "--target", rig.address, "--duration", 0.5, "--seed", 3)
    assert done.returncode == 1
    assert "BROKEN  refused == 0" in done.stdout


def test_a_search_ends_with_a_rate(rig: RouterRig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = load_tests(
        *("run", "chat", "--target", rig.address, "--duration", 0.3, "--rate", 5, "--precision", 3, "--out", out),
        *("--search-max-rate", "--slo", "errors == 0", "--slo", "sent <= 5"),
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "highest rate that holds" in found.stdout
    assert report_in(out)["figures"]["sent"] <= 5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "chat", "--target", "10.1.2.3:50051"), "must be a loopback address without --allow-remote"),
        (("run", "chat", "--target", "127.0.0.1:1"), "127.0.0.1:1 does not answer"),
        (("run", "no_such", "--target", "127.0.0.1:1"), "there is no scenario 'no_such'"),
        (("run", "chat", "--target", "127.0.0.1:1", "--rate", "-1"), "arrivals.rate must be in (0, 100000], is -1.0"),
        (("run", "router_speed", "--target", "127.0.0.1:1", "--rate", "5"), "arrivals.rate must not be given"),
        (("run", "chat", "--target", "127.0.0.1:1", "--concurrency", "5"), "arrivals.concurrency is for closed loops"),
        (("run", "chat", "--target", "127.0.0.1:1", "--search-max-rate"), "needs at least one --slo"),
        (("compare", "no_such", "no_such"), "is not a report"),
    ],
)
def test_what_cannot_be_run_is_exit_code_2_and_says_why(
    arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert complaint in err
    assert out == ""


def test_ctrl_c_ends_it_early_with_what_there_was(rig: RouterRig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "load_tests", "run", "chat", "--target", rig.address, "--out", out]
    before = num_accepted(rig)
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    try:
        give_up = time.monotonic() + 100
        while num_accepted(rig) == before:
            assert time.monotonic() < give_up, "it sent nothing"
            time.sleep(0.05)
        time.sleep(0.5)
        started = children(child.pid)
        os.killpg(child.pid, signal.SIGINT)
        stdout, stderr = child.communicate(timeout=60)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 1, stderr
    assert b"stopped early" in stdout
    assert report_in(out)["is_whole"] is False
    assert started
    assert not [pid for pid in started if is_alive(pid)]


def num_accepted(rig: RouterRig) -> int:
    """Return how many requests the router has had so far."""
    with grpc.insecure_channel(rig.address) as channel:
        found = StatusServiceStub(channel).GetStatus(GetStatusRequest(), timeout=20)
    return int(found.router.num_accepted_total)


def children(pid: int) -> list[int]:
    with suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
