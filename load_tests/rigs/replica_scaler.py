"""Has Ray Serve stop or start replicas of a running `octavo serve`, as a scaling policy would: who stops, drains.

    python -m load_tests.rigs.replica_scaler RAY_ADDRESS
    in    how many replicas there shall be, a line each
    out   "attached", then for each line the number, once Serve has taken it

`Scaler` is that process for whoever measures. Serve's own call for it is closed to applications that were not deployed
from a file, so what that call does is done in Serve's controller.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cluster.config import RayConfig, ServeConfig
from cluster.ray_connection import connected
from load_tests.rigs.router_rig import ROOT

STOP_S = 20.0


class Scaler:
    """Asks the process that is attached to Ray; blocks until it has answered."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        assert self._hear() == "attached"

    def scale(self, num_replicas: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{num_replicas}\n")
        self._process.stdin.flush()
        assert int(self._hear()) == num_replicas

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def scaler(ray_address: str, variables: Mapping[str, str]) -> Iterator[Scaler]:
    """A scaler for the scope; `variables` are what that Ray was started with."""
    set_to = [f"{name}={value}" for name, value in variables.items()]
    process = subprocess.Popen(
        ["env", *set_to, sys.executable, "-m", "load_tests.rigs.replica_scaler", ray_address],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        yield Scaler(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def set_replicas(controller: Any, app: str, deployment: str, num_replicas: int) -> int:
    """Tell Serve how many replicas there shall be. Runs in its controller."""
    from ray.serve._private.common import DeploymentID

    controller.deployment_state_manager.set_target_num_replicas(DeploymentID(deployment, app), num_replicas)
    return num_replicas


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.replica_scaler")
    parser.add_argument("ray_address")
    with connected(RayConfig(address=parser.parse_args().ray_address), lambda text: print(text, file=sys.stderr)):
        import ray  # not before `connected` has said how: Ray reads its variables when it is imported
        from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

        from cluster.app import WORKER

        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        app = ServeConfig().app
        print("attached", flush=True)
        for line in sys.stdin:
            print(ray.get(controller.__ray_call__.remote(set_replicas, app, WORKER, int(line))), flush=True)


if __name__ == "__main__":
    main()
