"""What a cluster costs that nobody asks anything: memory and processor time of one router, two replicas of the default
model and all of their Ray, by kind of process.

Memory is PSS: what processes share counts once. It is read when the cluster has answered a few requests and been left
alone for a while; processor time is that of the minute after. Two minutes.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from load_tests import process_tree
from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.elastic_cluster import serving

REPLICAS = 2
CONFIG = f"""
[replicas]
num_replicas = {REPLICAS}
[engine]
threads = 1
"""
SETTLE_S, WATCH_S = 20.0, 60.0
MAX_RAY_MIB, MAX_CORES = 750.0, 0.15
REPLICA: Final = "replica"
KINDS: Final = (
    ("raylet/raylet", "raylet"),
    ("gcs_server", "GCS"),
    ("dashboard/dashboard.py", "dashboard"),
    ("log_monitor.py", "log monitor"),
    ("monitor.py", "autoscaler monitor"),
    ("process_reaper.py", "reaper"),
    ("ray::ServeController", "Serve controller"),
    ("ray::ServeReplica:octavo:Router", "router"),
    ("ray::ServeReplica:octavo:", REPLICA),
    ("ray::SecretKeeper", "secret"),
    ("ray::SignalActor", "signal"),
    ("ray::DashboardAgent", "dashboard agent"),
    ("ray::RuntimeEnvAgent", "runtime-env agent"),
    ("ray::IDLE", "idle worker"),
    ("ray::", "other actor"),
    ("cluster.cli", "octavo serve"),
)
"""What is in a command line of each kind, the first that fits."""


def kind_of(command: str) -> str:
    """Return what kind of process a command line is one of."""
    # The raylet's has those of its agents in it.
    program = command.split(" --", 1)[0]
    return next((kind for part, kind in KINDS if part in program), "other")


async def measure(settings: Settings, notes: Notes) -> None:
    async with serving(CONFIG) as cluster:
        for _ in range(REPLICAS * 2):
            await cluster.client.generate("The sky is", max_tokens=8).complete()
        await asyncio.sleep(settings.seconds(SETTLE_S))
        before, began = look(cluster.pid), time.monotonic()
        await asyncio.sleep(settings.seconds(WATCH_S, 3.0))
        notes.add("idle", **table(before, look(cluster.pid), time.monotonic() - began))


Look = Mapping[int, tuple[str, int, float]]
"""Of each process by its pid: kind, PSS in bytes, and the processor time that it has used, in seconds."""


def look(pid: int) -> Look:
    """Look at `pid` and all that it started."""
    found = {}
    for process in process_tree.tree(pid):
        try:
            command = Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:  # it ended
            continue
        found[process.pid] = (kind_of(command), process_tree.pss_bytes(process.pid), process_tree.cpu_s(process.pid))
    return found


def table(before: Look, after: Look, seconds: float) -> dict[str, Any]:
    """Return, of each kind, how many processes there are, their memory in MiB and how many cores they kept busy."""
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for pid, (kind, size, used_s) in after.items():
        row = kinds[kind]
        row[0] += 1
        row[1] += size / 2**20
        row[2] += (used_s - (before[pid][2] if pid in before else 0.0)) / seconds
    rows = sorted(kinds.items(), key=lambda item: -item[1][1])
    return {
        "kinds": {kind: [number, round(mib, 1), round(cores, 4)] for kind, (number, mib, cores) in rows},
        "all_mib": round(sum(mib for _, (_, mib, _) in rows), 1),
        "without_replicas_mib": round(sum(mib for kind, (_, mib, _) in rows if kind != REPLICA), 1),
        "cores": round(sum(cores for _, (_, _, cores) in rows), 4),
        "seconds": round(seconds, 1),
    }


def judge(notes: Notes) -> list[Bar]:
    tables = notes.of("idle", "kinds")
    return [
        at_most(
            f"idle, 1 router and {REPLICAS} replicas: memory of all but the replicas, MiB (PSS)",
            notes.median("idle", "without_replicas_mib"),
            MAX_RAY_MIB,
            f"with them {figure(notes.median('idle', 'all_mib'), 'MiB')}: {_told(tables, 1)}",
        ),
        at_most(
            f"idle, 1 router and {REPLICAS} replicas: cores that are kept busy",
            notes.median("idle", "cores"),
            MAX_CORES,
            _told(tables, 2),
        ),
    ]


def _told(tables: Sequence[Mapping[str, Sequence[float]]], column: int) -> str:
    if not tables:
        return "not measured"
    rows = sorted(tables[-1].items(), key=lambda item: -item[1][column])
    return ", ".join(f"{int(row[0])} {kind} {row[column]:.3g}" for kind, row in rows if row[column])


if __name__ == "__main__":
    sys.exit(main("elastic_idle", measure, judge))
