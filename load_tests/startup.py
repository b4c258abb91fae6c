"""`python -m load_tests.startup`: how long a replica takes from its creation to its first token, and what memory.

Starts `octavo serve` with a cache of its own, and ends the replica twice while the node and the router stay: first with
the packed weights removed, so that the new replica packs them, then with them there. Each time requests are sent until
one is answered. Then 16 requests at once fill blocks. Writes JSON: {"first", "later"}, each {"seconds" from Serve's
creation of the actor to the first token at the client, "detail" how they add up}, and "peak_bytes", the PSS of each
process at its peak by what it is. Peaks of "replica" are of both replicas, the one that packed among them.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from load_tests import machine, process_tree
from load_tests.measurement import AskError
from load_tests.octavo_driver import OctavoDriver
from load_tests.serve_log import ReplicaStart, replica_starts
from load_tests.server import ServerError, end_on_sigterm, watched

TIMEOUT_S = 180.0
POLL_S = 0.02
VOCABULARY = range(200, 49_000)
PROMPT_TOKENS = 64
LOAD = (16, 256, 64)
"""Requests at once, tokens of each prompt, of each answer."""

Report = dict[str, object]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.startup", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a .gguf file or a directory; left out: the file of the default model")
    parser.add_argument("--blocks", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="where the JSON goes; left out: stdout")
    parser.add_argument("serve", nargs="*", help="arguments for octavo serve, after --")
    arguments = parser.parse_args()
    end_on_sigterm()
    model = arguments.model or _default_weights()
    with tempfile.TemporaryDirectory(prefix="ocs", dir="/tmp") as folder:
        try:
            report = measure(Path(folder), model, arguments.blocks, arguments.serve)
        except (ServerError, AskError) as error:
            raise SystemExit(f"startup: {error}") from None
    text = json.dumps(report, indent=1) + "\n"
    if arguments.out is None:
        sys.stdout.write(text)
    else:
        arguments.out.write_text(text)


def measure(folder: Path, model: str, blocks: int, options: list[str]) -> Report:
    """Return the report; `folder` is empty, and its name short enough for Ray's sockets."""
    load = machine.load_average()
    temp_dir, cache = folder / "ray", folder / "cache"
    command = [str(Path(sys.executable).with_name("octavo")), "serve", "--port", "0", "--replicas", "1"]
    variables = {
        "OCTAVO_CACHE_DIR": str(cache),
        "OCTAVO_RAY__TEMP_DIR": str(temp_dir),
        "OCTAVO_ENGINE__NUM_BLOCKS": str(blocks),
        "OCTAVO_REPLICAS__HEALTH_CHECK_PERIOD_S": "0.5",
    }
    with watched([*command, "--model", model, *options], variables, folder / "log") as (server, watch):
        ready = json.loads(server.await_line("{", TIMEOUT_S))
        starts = asyncio.run(_drive(str(ready["address"]), temp_dir, cache))
        watch.sample()
        names = {process.pid: _title(process.pid) for process in process_tree.tree(server.pid)}
        names |= {start.pid: "replica" for start, _ in starts}
        peaks: dict[str, int] = {}
        for pid, name in names.items():
            peaks[name] = max(peaks.get(name, 0), watch.peak_of([pid]))
    first, later = (_report(start, answered) for start, answered in starts)
    return {
        "load_before": load,
        "first": first,
        "later": later,
        "peak_bytes": peaks,
        "peak_tree_bytes": watch.peak_tree,
    }


async def _drive(address: str, temp_dir: Path, cache: Path) -> list[tuple[ReplicaStart, float]]:
    """Return both starts, each with the time of its first token."""
    async with OctavoDriver(address) as driver:
        await driver.ask(_prompt(PROMPT_TOKENS), 1)
        shutil.rmtree(cache / "packed", ignore_errors=True)
        starts = [await _replaced(driver, temp_dir) for _ in range(2)]
        requests, prompt, answer = LOAD
        await asyncio.gather(*(driver.ask(_prompt(prompt), answer) for _ in range(requests)))
    return starts


async def _replaced(driver: OctavoDriver, temp_dir: Path) -> tuple[ReplicaStart, float]:
    """End the replica and wait until another one answers. Raises ServerError."""
    before = replica_starts(temp_dir)
    os.kill(before[-1].pid, signal.SIGKILL)
    give_up = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up:
        with contextlib.suppress(AskError):
            sample = await driver.ask(_prompt(PROMPT_TOKENS), 1)
            answered = time.time() - sample.total_s + sample.first_token_s
            starts = replica_starts(temp_dir)
            if len(starts) > len(before):
                return starts[-1], answered
        await asyncio.sleep(POLL_S)
    raise ServerError(f"no replica answered within {TIMEOUT_S:.0f} s of the end of the one before")


def _report(start: ReplicaStart, answered: float) -> Report:
    parts = {
        "process and Serve": start.entered - start.created,
        "our start": start.initialised - start.entered,
        "first token": answered - start.initialised,
    }
    return {
        "seconds": round(answered - start.created, 2),
        "detail": ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts.items()),
    }


def _title(pid: int) -> str:
    """Return what a process calls itself, without its arguments."""
    with contextlib.suppress(OSError):
        words = (
            (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split()
        )
        names = [Path(word).name for word in words if not word.startswith("-")]
        if names and names[0].startswith("python"):
            names = names[1:]
        return names[0] if names else str(pid)
    return str(pid)


def _prompt(num_tokens: int) -> list[int]:
    return random.choices(VOCABULARY, k=num_tokens)


def _default_weights() -> str:
    """Fetch the default model into the user's own cache, if it is not there; return its file."""
    command = [str(Path(sys.executable).with_name("octavo")), "models", "pull", "default", "--json"]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return str(json.loads(said)["files"]["weights"])


if __name__ == "__main__":
    main()
