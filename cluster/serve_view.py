"""What Serve's controller says of an application: its deployments, their replicas, and why one does not start.

The only file that asks the controller for more than `serve.status()`, which names no replica. Ray is connected and
Serve started.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from workers import errors
from workers.errors import ConfigError, StartupError

RUNNING = "RUNNING"
"""Of an application, and of a replica."""
_WORDS = {RUNNING: "serving", "STOPPING": "draining"}
DEPLOYING, FAILED = "DEPLOYING", "DEPLOY_FAILED"
SETTLED = frozenset({"HEALTHY", "UPSCALING", "DOWNSCALING"})
"""States of a deployment that has what it was told to have, or moves by its own scaling."""
_REMOTE_ERROR = re.compile(r"workers\.errors\.(\w+): (.+)")
_REMOTE_EXCEPTION = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): .+$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServeReplica:
    id: str
    state: str
    """STARTING, RUNNING, STOPPING, ..."""
    has_place: bool = True
    """Whether a node has been found for it."""


@dataclass(frozen=True, slots=True)
class DeploymentView:
    status: str
    message: str
    target: int
    replicas: tuple[ServeReplica, ...]

    @property
    def running(self) -> frozenset[str]:
        """The replicas that routers are told of, by id."""
        return frozenset(replica.id for replica in self.replicas if replica.state == RUNNING)

    @property
    def failure(self) -> StartupError | None:
        """Why its replicas do not start: in the words of the error that one of them met, which retries would meet
        again, or in Serve's when it has given up."""
        if found := _REMOTE_ERROR.findall(self.message):
            name, text = found[-1]
            kind = getattr(errors, name, StartupError)
            return (kind if issubclass(kind, StartupError) else StartupError)(text)
        if self.status != FAILED:
            return None
        causes = _REMOTE_EXCEPTION.findall(self.message)
        return StartupError(causes[-1] if causes else self.message)

    def __str__(self) -> str:
        states = [replica.state for replica in self.replicas]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        return f"{self.status}, {counts or 'no replica'} of {self.target}"


@dataclass(frozen=True, slots=True)
class ApplicationView:
    status: str
    message: str
    deployments: Mapping[str, DeploymentView]

    @property
    def replica_ids(self) -> frozenset[str]:
        """Of all deployments, in whatever state."""
        return frozenset(replica.id for each in self.deployments.values() for replica in each.replicas)

    def find(self, replica: str, *, among: Collection[str]) -> tuple[str, str]:
        """Return the deployment, one of `among`, and the id of the running replica that an id or its beginning means.

        Raises ConfigError.
        """
        replicas = [(name, each) for name in among for each in sorted(self.deployments[name].running)]
        exact = [found for found in replicas if found[1] == replica]
        found = exact or [found for found in replicas if found[1].startswith(replica)]
        if len(found) != 1:
            there = ", ".join(each for _, each in replicas) or "none"
            raise ConfigError(f"REPLICA must be the id of one, or its beginning, of {there}; is {replica!r}")
        return found[0]

    def __str__(self) -> str:
        return "; ".join(f"{name}: {each}" for name, each in self.deployments.items()) or self.status


class Progress:
    """Says how far a change has come, once for each step: what of each deployment is old and what is new."""

    def __init__(self, before: ApplicationView | None, note: Callable[[str], None]) -> None:
        self._old = frozenset() if before is None else before.replica_ids
        self._note = note
        self._said: dict[str, str] = {}

    def __call__(self, view: ApplicationView) -> None:
        for name, deployment in view.deployments.items():
            text = self._text(deployment)
            if text != self._said.get(name) and (self._is_moving(deployment) or name in self._said):
                self._said[name] = text
                self._note(f"{name}: {text}")

    def _is_moving(self, deployment: DeploymentView) -> bool:
        return any(each.id not in self._old or each.state != RUNNING for each in deployment.replicas)

    def _text(self, deployment: DeploymentView) -> str:
        counts: dict[str, int] = {}
        for replica in deployment.replicas:
            age = "old" if replica.id in self._old else "new"
            state = _WORDS.get(replica.state, "starting") if replica.has_place else "waiting for room"
            counts[f"{age} {state}"] = counts.get(f"{age} {state}", 0) + 1
        return ", ".join(f"{count} {what}" for what, count in sorted(counts.items())) or "none"


def look(application: str) -> ApplicationView | None:
    """Return how `application` is, None if Serve has none of that name. Raises ray.exceptions.RayError."""
    from ray.serve.context import _get_global_client

    found = _get_global_client().get_serve_details()["applications"].get(application)
    if found is None or _word(found["status"]) == "NOT_STARTED":
        return None
    return ApplicationView(
        _word(found["status"]),
        found["message"],
        {name: _deployment(each) for name, each in found["deployments"].items()},
    )


def versions(application: str, deployments: Collection[str]) -> dict[str, str]:
    """Return the versions of deployments that are there. Raises ray.exceptions.RayError."""
    import ray
    from ray.serve.context import _get_global_client
    from ray.serve.generated.serve_pb2 import DeploymentRoute

    controller = _get_global_client()._controller
    told = ray.get([controller.get_deployment_info.remote(name, application) for name in deployments])
    return {
        name: DeploymentRoute.FromString(each).deployment_info.version
        for name, each in zip(deployments, told, strict=True)
    }


def _deployment(details: Mapping[str, Any]) -> DeploymentView:
    return DeploymentView(
        _word(details["status"]),
        details["message"],
        details["target_num_replicas"],
        tuple(
            ServeReplica(each["replica_id"], _word(each["state"]), each.get("node_id") is not None)
            for each in details["replicas"]
        ),
    )


def _word(state: Any) -> str:
    """Serve's states are enumerations of strings."""
    return str(getattr(state, "value", state))
