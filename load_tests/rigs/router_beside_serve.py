"""What a token costs end to end, beside a router actor that calls Serve handles for every token, in the same run.

`octavo serve --engine fake`, Session and Generate, and `serve_app.py`, Generate: both on a Ray of their own, the same
streams, requests, tokens and step, in turns. What counts is the CPU of all processes of each, Ray's and the client's
included, less what they take when idle, by tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from load_tests import process_tree
from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure, ratio
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.lean_crew import LeanLoad, load
from load_tests.server import ServerProcess

STREAMS, OUTPUT, REQUESTS = 64, 128, 128
STEP_MS = 5.0
MAX_SHARE = 0.2
START_S = 120.0
IDLE_S = 3.0
WAYS = {"session": "octavo", "generate": "octavo", "serve": "serve"}
"""What is compared, and which server it asks."""


class Server:
    """Implements `lean_crew.Target`: a server and all that it started."""

    def __init__(self, process: ServerProcess) -> None:
        self.address: str = json.loads(process.await_line("{", START_S))["address"]
        self._pid = process.pid
        self.idle_share = 0.0
        """Of a core."""

    def cpu_s(self) -> dict[str, float]:
        return {"all": sum(process_tree.cpu_s(process.pid) for process in process_tree.tree(self._pid))}

    def look_idle(self, seconds: float) -> None:
        before = self.cpu_s()["all"]
        time.sleep(seconds)
        self.idle_share = (self.cpu_s()["all"] - before) / seconds


@contextmanager
def server(command: Sequence[str], variables: dict[str, str], log: Path) -> Iterator[Server]:
    process = ServerProcess([sys.executable, "-m", *command], {"RAY_AUTH_MODE": "disabled", **variables}, log)
    try:
        yield Server(process)
    finally:
        process.stop()


async def measure(settings: Settings, notes: Notes) -> None:
    octavo = ("cluster.cli", "serve", "--port", "0", "--replicas", "1", "--model", "fake", "--engine", "fake")
    engine = {"OCTAVO_ENGINE__FAKE_STEP_S": str(STEP_MS / 1e3), "OCTAVO_ENGINE__MAX_NUM_SEQUENCES": str(STREAMS)}
    app = ("load_tests.rigs.serve_app", "--step-ms", str(STEP_MS))
    with (
        tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder,
        server(octavo, engine, Path(folder) / "octavo.log") as ours,
        server(app, {}, Path(folder) / "serve.log") as theirs,
    ):
        servers = {"octavo": ours, "serve": theirs}
        for way in WAYS:
            await _run(servers[WAYS[way]], way, requests=STREAMS // 4)  # opens streams, imports, fills caches
        for each in servers.values():
            each.look_idle(IDLE_S)
        for _ in settings.rounds():
            for way in WAYS:
                requests = STREAMS if settings.is_quick else REQUESTS
                notes.add(way, **await _run(servers[WAYS[way]], way, requests=requests))


async def _run(target: Server, way: str, *, requests: int) -> dict[str, Any]:
    call = "session" if way == "session" else "generate"
    streams = min(STREAMS, requests)
    began = time.monotonic()
    counts, cpu_s = await load(
        target,
        LeanLoad(call=call, streams=streams, output=OUTPUT, requests=requests, duration_s=60.0, tells_time=False),
    )
    wall_s = time.monotonic() - began
    used = cpu_s["all"] - target.idle_share * wall_s
    tokens = max(counts.tokens, 1)
    return {
        "sent": counts.sent,
        "ended": counts.ended,
        "extra": counts.extra,
        "errors": dict(counts.errors),
        "tokens": counts.tokens,
        "idle_share": target.idle_share,
        "server_us_per_token": 1e6 * used / tokens,
        "client_us_per_token": 1e6 * counts.cpu_s / tokens,
        "us_per_token": 1e6 * (used + counts.cpu_s) / tokens,
        "wall_s": wall_s,
    }


def judge(notes: Notes) -> list[Bar]:
    theirs = notes.median("serve", "us_per_token")
    bars = []
    for way in ("session", "generate"):
        ours = notes.median(way, "us_per_token")
        detail = f"{figure(ours, 'µs')}; router actor and Serve handles {figure(theirs, 'µs')}; all processes"
        if way == "session":
            bars.append(at_most("CPU per token end to end, x Serve handles", ratio(ours, theirs), MAX_SHARE, detail))
        else:
            bars.append(at_most("the same over Generate, x Serve handles", ratio(ours, theirs), 1.0, detail))
    return bars


if __name__ == "__main__":
    sys.exit(main("router_beside_serve", measure, judge))
