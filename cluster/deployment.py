"""Our application on a Ray that this process is connected to: put there, waited for, drained and removed.

Says why a replica does not start in the words of the error that it met there. Knows no signals and starts no Ray.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from ray import serve

from cluster import app
from cluster.config import ClusterConfig
from cluster.secret import ensure_secret
from workers import errors
from workers.errors import StartupError

POLL_S = 0.1
CALL_TIMEOUT_S = 10.0
DELETE_TIMEOUT_S = 65.0
"""Serve's own limit is 60 s."""
_REMOTE_ERROR = re.compile(r"workers\.errors\.(\w+): (.+)")
_REMOTE_EXCEPTION = re.compile(r"^(?:\w+\.)*\w+(?:Error|Exception): .+$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    """What a router says of itself and of the replicas that it knows."""

    address: str
    own_address: str
    models: list[str]
    replicas: list[dict[str, Any]]


class Deployment:
    """The application of `config`."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = config
        self._name = config.serve.app
        self._is_deployed = False
        self._router: Any = None

    def deploy(self) -> None:
        """Hand the application to Serve; returns before anything of it runs. Raises StartupError."""
        for name in ("ray", "ray.serve"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled")
        if self._name in serve.status().applications:
            raise StartupError(f"that Ray runs an application {self._name} already; name another with --app")
        environ = os.environ if self._config.ray.address else None
        application = app.build(self._config, cores=app.cores_of_node(), secret=ensure_secret(), environ=environ)
        self._is_deployed = True
        serve.run_many(
            [serve.RunTarget(application, name=self._name, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def await_ready(self) -> list[RouterView]:
        """Wait until every router has all replicas; return them. Raises StartupError saying what went wrong, or what is
        missing."""
        end = time.monotonic() + self._config.serve.start_timeout_s
        while not (state := self._state()).is_running:
            if time.monotonic() >= end:
                raise StartupError(f"not ready after {self._config.serve.start_timeout_s:g} s: {state.text}")
            time.sleep(POLL_S)
        self._router = serve.get_app_handle(self._name)
        while True:
            told = self._router.broadcast("describe").results(timeout_s=CALL_TIMEOUT_S)
            views = [RouterView(**each) for each in told]
            if len(views) >= self._config.serve.num_routers and all(map(self._has_all, views)):
                return views
            replicas = [replica for view in views for replica in view.replicas]
            if any(replica["state"] == "refused" for replica in replicas) or time.monotonic() >= end:
                states = ", ".join(f"{each['id']} is {each['state']} {each['detail']}" for each in replicas)
                raise StartupError(
                    f"{len(views)} of {self._config.serve.num_routers} routers are there, and not each has all "
                    f"{self._config.replicas.num_replicas} replicas: {states}"
                )
            time.sleep(POLL_S)

    def _has_all(self, view: RouterView) -> bool:
        ready = [replica for replica in view.replicas if replica["state"] == "ready"]
        return len(ready) >= self._config.replicas.num_replicas

    def remove(self, *, is_hurried: Callable[[], bool]) -> None:
        """Let running requests finish and take the application away; do not wait for either when hurried. Never raises.

        No call of ours is under way afterwards, unless Ray does not answer: one that finds Ray gone would end the
        process with an error.
        """
        if not self._is_deployed:
            return
        if self._router is not None:
            _attempt(self._drain, self._config.router.drain_grace_s + CALL_TIMEOUT_S, is_hurried)
        _attempt(self._delete, DELETE_TIMEOUT_S, is_hurried)

    def _drain(self, is_over: Callable[[], bool]) -> None:
        drained = self._router.broadcast("drain")
        while not is_over():
            with suppress(TimeoutError):
                drained.results(timeout_s=POLL_S)
                return

    def _delete(self, is_over: Callable[[], bool]) -> None:
        serve.delete(self._name, _blocking=False)
        while self._name in serve.status().applications and not is_over():
            time.sleep(POLL_S)

    def _state(self) -> _State:
        """Raises StartupError when it cannot become ready."""
        status = serve.status().applications.get(self._name)
        if status is None:
            return _State(False, "Serve does not know the application yet")
        messages = [
            message for message in (status.message, *(d.message for d in status.deployments.values())) if message
        ]
        for message in messages:
            if found := _REMOTE_ERROR.findall(message):
                name, text = found[-1]
                kind = getattr(errors, name, StartupError)
                raise (kind if issubclass(kind, StartupError) else StartupError)(text)
        text = "; ".join(f"{name}: {d.status.value} {dict(d.replica_states)}" for name, d in status.deployments.items())
        if status.status == "DEPLOY_FAILED":
            causes = [cause for message in messages for cause in _REMOTE_EXCEPTION.findall(message)]
            raise StartupError(
                f"the application does not start: {causes[-1] if causes else '; '.join(messages) or text}"
            )
        return _State(status.status == "RUNNING", text)


@dataclass(frozen=True, slots=True)
class _State:
    is_running: bool
    text: str


def _attempt(step: Callable[[Callable[[], bool]], None], timeout_s: float, is_hurried: Callable[[], bool]) -> None:
    """Do `step`, which ends soon after its argument says that it is over; leave it alone if Ray does not answer it."""
    end = time.monotonic() + timeout_s

    def is_over() -> bool:
        return is_hurried() or time.monotonic() >= end

    def run() -> None:
        try:
            step(is_over)
        except Exception as error:
            logging.getLogger(__name__).warning("stopping: %s", error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive() and not is_over():
        thread.join(POLL_S)
    thread.join(CALL_TIMEOUT_S)
