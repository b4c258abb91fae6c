"""When Ray Serve started a replica, and when it was ready, read from the logs of a Ray of our own.

Serve writes them below the session's directory, a line an event, with this machine's local time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

_LINE = re.compile(r"\w+ (?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .* -- (?P<text>.*)")
_CREATED = re.compile(r"Starting Replica\(id='(?P<id>\w+)', deployment='Worker'")
_READY = re.compile(r"Replica\(id='(?P<id>\w+)', deployment='Worker'.* started successfully .*\(PID: (?P<pid>\d+)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStart:
    """Times are seconds since the epoch."""

    replica_id: str
    created: float
    """The controller asks Ray for the actor."""
    entered: float
    """The process is there, Ray and Serve are imported, and our class begins."""
    initialised: float
    """Model loaded, data port open."""
    ready: float
    """The controller knows."""
    pid: int


def replica_starts(temp_dir: Path) -> list[ReplicaStart]:
    """Return the replicas of the engine that got ready, in the order of their creation."""
    logs = temp_dir / "session_latest" / "logs" / "serve"
    created: dict[str, float] = {}
    starts = []
    for log in sorted(logs.glob("controller_*.log")):
        for at, text in _lines(log):
            if found := _CREATED.match(text):
                created[found["id"]] = at
            elif (found := _READY.match(text)) and found["id"] in created:
                marks = {words: when for when, words in _lines(_replica_log(logs, found["id"]))}
                starts.append(
                    ReplicaStart(
                        replica_id=found["id"],
                        created=created[found["id"]],
                        entered=marks["Started initializing replica."],
                        initialised=marks["Finished initializing replica."],
                        ready=at,
                        pid=int(found["pid"]),
                    )
                )
    return starts


def _replica_log(logs: Path, replica_id: str) -> Path:
    (log,) = logs.glob(f"replica_*_Worker_{replica_id}.log")
    return log


def _lines(log: Path) -> list[tuple[float, str]]:
    found = (_LINE.match(line) for line in log.read_text(errors="replace").splitlines())
    return [(_seconds(line["time"]), line["text"]) for line in found if line]


def _seconds(text: str) -> float:
    return datetime.strptime(text, "%Y-%m-%d %H:%M:%S,%f").timestamp()
