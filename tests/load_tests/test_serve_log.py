"""What is read from Serve's logs about a replica's start."""

from __future__ import annotations

from pathlib import Path

import pytest

from load_tests.serve_log import replica_starts

CONTROLLER = """
INFO 2026-03-01 07:11:45,874 controller 11 -- Controller starting (version='2.60.0').
INFO 2026-03-01 07:11:46,235 controller 11 -- Starting Replica(id='dmr7', deployment='Worker', app='octavo').
INFO 2026-03-01 07:11:46,238 controller 11 -- Starting Replica(id='njrv', deployment='Router', app='octavo').
INFO 2026-03-01 07:11:56,478 controller 11 -- Replica(id='njrv', deployment='Router', app='octavo') started \
successfully on node 'c22' after 10.2s (PID: 12008).
INFO 2026-03-01 07:12:01,969 controller 11 -- Replica(id='dmr7', deployment='Worker', app='octavo') started \
successfully on node 'c22' after 15.7s (PID: 12002).
Traceback (most recent call last):
INFO 2026-03-01 07:13:00,000 controller 11 -- Starting Replica(id='late', deployment='Worker', app='octavo').
"""
REPLICA = """
INFO 2026-03-01 07:11:55,398 octavo_Worker dmr7 -- Started initializing replica.
INFO 2026-03-01 07:12:01,629 octavo_Worker dmr7 -- Finished initializing replica.
"""


def test_starts_of_replicas_that_got_ready(tmp_path: Path) -> None:
    logs = tmp_path / "session_latest" / "logs" / "serve"
    logs.mkdir(parents=True)
    (logs / "controller_11.log").write_text(CONTROLLER)
    (logs / "replica_octavo_Worker_dmr7.log").write_text(REPLICA)
    (start,) = replica_starts(tmp_path)
    assert (start.replica_id, start.pid) == ("dmr7", 12002)
    parts = (start.entered - start.created, start.initialised - start.entered, start.ready - start.initialised)
    assert parts == pytest.approx((9.163, 6.231, 0.340), abs=1e-4)


def test_no_logs(tmp_path: Path) -> None:
    assert replica_starts(tmp_path) == []
