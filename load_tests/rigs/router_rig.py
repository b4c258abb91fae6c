"""Bare routers in front of fake replicas, each in a process of its own, without Ray: what router benchmarks load.

    with RouterRig(RigConfig(replicas=2, step_s=0.005)) as rig:
        ... rig.address, rig.cpu_s() ...

    python -m load_tests.rigs.router_rig --replicas 2 --step-ms 5      until Ctrl-C; prints the address

Loopback and free ports only. The processes end when this one does, whatever ends it: they watch their standard input.
"""

from __future__ import annotations

import argparse
import json
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.grpc_environment import process_environment
from load_tests import process_tree

ROOT = Path(__file__).parents[2]
STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RigConfig:
    """`step_s`, `num_sequences` and `chunk_tokens` make a replica's speed: each step takes as long, gives each running
    sequence one token and computes at most so many prompt tokens."""

    replicas: int = 1
    step_s: float = 0.005
    num_sequences: int = 64
    num_blocks: int = 4_096
    block_size: int = 16
    chunk_tokens: int = 256
    prefix_cache: bool = True
    tells_time: bool = False
    """Tokens say when they were made, and steps begin every `step_s`; see router_clock.py."""
    port: int = 0
    router: Mapping[str, Any] = field(default_factory=dict)
    """Fields of RouterConfig that differ from the defaults."""
    placement: str = ""
    """One of router_policies.py; empty: the router's own."""
    routers: int = 1
    """Each uses all replicas. A single one is called "router", several "router-0", "router-1", ..."""
    shares_port: bool = False
    """Whether all routers listen on one port, as those of a node do."""
    is_encrypted: bool = False
    """Whether the data ports speak TLS. The public ports do if `router` names a certificate (`rig_trust.py`)."""


class RouterRig:
    """Starts when entered, and is over when left."""

    def __init__(self, config: RigConfig) -> None:
        self._config = config
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self.addresses: tuple[str, ...] = ()
        """Where clients go: one for each router, or a single one if they share a port."""
        self.routers: dict[str, str] = {}
        """Where one router alone can be reached, by its name."""
        self.replicas: dict[str, str] = {}
        """Where the data ports are, by the replica's id."""
        self.secret = secrets.token_bytes(32)
        """The cluster's, which opens the data ports."""

    @property
    def address(self) -> str:
        """Where clients go, the first of them."""
        return self.addresses[0]

    @property
    def pids(self) -> dict[str, int]:
        """By "router", "replica-0", ..."""
        return {name: process.pid for name, process in self._processes.items()}

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds that each process has used, user and system."""
        return {name: process_tree.cpu_s(pid) for name, pid in self.pids.items()}

    def __enter__(self) -> Self:
        try:
            self._start_replicas()
            self._start_routers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process, the router first. Idempotent."""
        for process in reversed(self._processes.values()):
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        for process in self._processes.values():
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
        self._processes.clear()

    def kill(self, name: str) -> None:
        """End a process with SIGKILL."""
        process = self._processes.pop(name)
        process.kill()
        process.wait()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        process.stdout.close()

    def _start_replicas(self) -> None:
        config = self._config
        engine = {
            "fake_step_s": config.step_s,
            "max_num_sequences": config.num_sequences,
            "num_blocks": config.num_blocks,
            "block_size": config.block_size,
            "chunk_tokens": config.chunk_tokens,
            "prefix_cache": config.prefix_cache,
        }
        job = {"role": "replica", "engine": engine, "tells_time": config.tells_time}
        names = [f"replica-{number}" for number in range(config.replicas)]
        for name in names:
            self._start(name, job)
        self.replicas = {name: self._await_ready(name)["address"] for name in names}

    def _start_routers(self) -> None:
        config = self._config
        job = {"role": "router", "port": config.port, "config": dict(config.router), "placement": config.placement}
        job |= {"shares_port": config.shares_port, "replicas": list(self.replicas.items())}
        names = ["router"] if config.routers == 1 else [f"router-{number}" for number in range(config.routers)]
        ready: dict[str, dict[str, str]] = {}
        for name in names:
            self._start(name, job)
            job["port"] = 0
            if config.shares_port:
                ready[name] = self._await_ready(name)
                job["port"] = int(ready[name]["address"].rpartition(":")[2])
        ready |= {name: self._await_ready(name) for name in names if name not in ready}
        self.addresses = tuple(dict.fromkeys(each["address"] for each in ready.values()))
        self.routers = {name: each["own_address"] for name, each in ready.items()}

    def _start(self, name: str, job: dict[str, Any]) -> None:
        job = {**job, "id": name, "secret": self.secret.hex(), "is_encrypted": self._config.is_encrypted}
        process = self._processes[name] = subprocess.Popen(
            [sys.executable, "-m", "load_tests.rigs.router_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=process_environment(),
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()

    def _await_ready(self, name: str) -> dict[str, str]:
        stdout = self._processes[name].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise RuntimeError(f"{name} of the rig did not start; it says above why")
        ready: dict[str, str] = json.loads(line)
        return ready


def is_router(name: str) -> bool:
    """Say whether a process of a rig is a router."""
    return name.startswith("router")


def main() -> None:
    """Run a rig until a signal ends it."""
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.router_rig", description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="of the router; default: a free one")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--step-ms", type=float, default=5.0, help="how long a step takes")
    parser.add_argument("--sequences", type=int, default=64, help="that run at once, of one replica")
    parser.add_argument("--chunk-tokens", type=int, default=256, help="prompt tokens of a step")
    parser.add_argument("--blocks", type=int, default=4_096, help="of one replica's cache, 16 tokens each")
    parser.add_argument("--tells-time", action="store_true", help="tokens say when they were made")
    arguments = parser.parse_args()
    config = RigConfig(
        port=arguments.port,
        replicas=arguments.replicas,
        step_s=arguments.step_ms / 1e3,
        num_sequences=arguments.sequences,
        chunk_tokens=arguments.chunk_tokens,
        num_blocks=arguments.blocks,
        tells_time=arguments.tells_time,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with RouterRig(config) as rig, suppress(KeyboardInterrupt):
        print(json.dumps({"event": "ready", "address": rig.address, "pids": rig.pids}), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
