"""What was decided can be read in a file, and decided again from it."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from pathlib import Path

import pytest

from router.decision_log import DecisionLog, read_decision
from router.placement import LeastCost, PromptHashes, replay
from router.types import Candidate, Decision
from tests.router_back.made_requests import make_request
from tests.router_back.test_placement import KEY, Replica, make_roster

DECISION = Decision(replica="one", rule="only", candidates=(Candidate("one", 4, 1.0, 2.0, 8.0, 16.0, 32.0),), attempt=2)


def lines_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_all_that_decided(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "log", "router-1")
    log.add(make_request([1, 2], affinity_key="key"), DECISION)
    log.close()
    (line,) = lines_of(tmp_path / "log")
    assert abs(float(str(line.pop("at"))) - time.time()) < 60
    terms = {"matched": 4, "owed": 1.0, "uncached": 2.0, "decode": 8.0, "displaced": 16.0, "recent": 32.0, "cost": 59.0}
    assert line == {
        "router": "router-1",
        "request": "r",
        "attempt": 2,
        "affinity_key": "key",
        "replica": "one",
        "rule": "only",
        "matched": 0,
        "candidates": [{"replica": "one", **terms}],
    }


def test_every_logged_decision_is_made_again_from_its_terms(tmp_path: Path) -> None:
    rng = random.Random(4)
    log = DecisionLog(tmp_path / "log", "router-1")
    placement = LeastCost(rng)
    prompts = [[rng.randrange(9) for _ in range(40)] for _ in range(4)]
    for _ in range(200):
        replicas = [
            Replica(str(i), owed_tokens=rng.choice([0, 0, 10, 50])).holds(rng.choice(prompts), rng.randrange(9))
            for i in range(rng.randrange(1, 20))
        ]
        request = make_request(rng.choice(prompts), affinity_key=rng.choice(["", "u", "v"]))
        decision = placement.place(request, PromptHashes(KEY, request), make_roster(*replicas))
        assert decision is not None
        log.add(request, decision)
    log.close()
    rules = set()
    for line in (tmp_path / "log").read_text().splitlines():
        read = read_decision(line)
        assert read is not None
        decision, affinity_key = read
        assert replay(decision, affinity_key) == (decision.replica, decision.rule)
        rules.add(decision.rule)
    assert rules == {"only", "affinity", "prefix", "least_loaded"}


def test_what_the_disk_does_not_take_is_dropped_counted_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A pipe that nobody reads stands for a disk that hangs: who adds does not wait for it."""
    path = tmp_path / "log"
    os.mkfifo(path)
    log = DecisionLog(path, "router-1", max_queued=8)
    with caplog.at_level(logging.WARNING, logger="router.decision_log"):
        for _ in range(100):
            log.add(make_request([1]), DECISION)
    assert log.num_dropped >= 100 - 8 - 8 - 1
    assert len(caplog.records) == 1
    with path.open() as reader:
        log.close()
        read = [json.loads(line) for line in reader]
    assert sum("replica" in line for line in read) + log.num_dropped == 100
    assert sum(line.get("dropped", 0) for line in read) == log.num_dropped
    assert read_decision(json.dumps({"at": 1.0, "router": "r", "dropped": 3})) is None


def test_file_and_its_predecessor_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "log"
    logs = [DecisionLog(path, name, max_bytes=2_000) for name in ("one", "two")]
    for _ in range(60):
        for log in logs:
            log.add(make_request([1]), DECISION)
        time.sleep(0.001)
    for log in logs:
        log.close()
    assert {each.name for each in tmp_path.iterdir()} <= {"log", "log.1"}
    for each in tmp_path.iterdir():
        assert lines_of(each), "whole lines only"


def test_a_path_that_cannot_be_written_costs_the_log_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, logger="router.decision_log"):
        log = DecisionLog(tmp_path / "nowhere" / "log", "router-1")
        log.add(make_request([1]), DECISION)
        log.close()
    assert log.num_dropped == 1
    assert "decisions cannot be written to" in caplog.text


def fails_once_more(log: DecisionLog) -> None:
    """Add a decision and wait until it is seen that it cannot be written."""
    before = log.num_dropped
    log.add(make_request([1]), DECISION)
    while log.num_dropped == before:
        time.sleep(0.001)


def test_a_full_disk_is_told_once_and_what_it_cost_when_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each failed attempt logged an error, for each request one, onto the disk that was full; and the counts that an
    attempt would have told were lost with it."""
    path = tmp_path / "log"
    path.symlink_to("/dev/full")
    with caplog.at_level(logging.ERROR, logger="router.decision_log"):
        log = DecisionLog(path, "router-1")
        for _ in range(4):
            fails_once_more(log)
        path.unlink()
        log.add(make_request([1]), DECISION)
        log.close()
    assert len(caplog.records) == 1
    decided, dropped = lines_of(path)
    assert decided["replica"] == "one"
    assert dropped["dropped"] == log.num_dropped == 4


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    """As by a disk that was full in the middle of it; the next decision was written behind it, into the same line."""
    path = tmp_path / "log"
    path.write_text('{"at":1.0,"rout')
    for _ in range(2):
        log = DecisionLog(path, "router-1")
        log.add(make_request([1]), DECISION)
        log.close()
    cut_off, *lines = path.read_text().splitlines()
    assert cut_off == '{"at":1.0,"rout'
    assert [read_decision(line) for line in lines] == [(DECISION, "")] * 2
