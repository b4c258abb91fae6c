"""Has Ray Serve stop or start replicas of a running `octavo serve`, as a scaling policy would: who stops, drains.

    python -m load_tests.rigs.replica_scaler RAY_ADDRESS
    in    how many replicas there shall be, a line each
    out   "attached", then for each line the number, once Serve has taken it

Serve's own call for it is closed to applications that were not deployed from a file, so what that call does is done in
Serve's controller.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.config_sections import RayConfig, ServeConfig
from cluster.ray_connection import connected


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
