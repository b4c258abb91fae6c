"""Our application on a Ray that this process is connected to: put there, changed, waited for, drained and removed.

Says why a replica does not start in the words of the error that it met there. Knows no signals and starts no Ray.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException

from cluster import app
from cluster.boot import ClusterBoot, forwarded
from cluster.config import ClusterConfig
from cluster.secret import ensure_secret
from cluster.serve_view import DEPLOYING, FAILED, RUNNING, SETTLED, ApplicationView, look, versions
from cluster.signal import SignalSource, ensure_signal
from workers.errors import StartupError

STALE_S = 10.0
"""For so long after a change a failure that was there before it may be the former one's."""
POLL_S = 0.1
CALL_TIMEOUT_S = 10.0
DELETE_TIMEOUT_S = 65.0
"""Serve's own limit is 60 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterView:
    """What a router says of itself and of the replicas that it knows."""

    address: str
    own_address: str
    metrics: str
    models: list[str]
    replicas: list[dict[str, Any]]
    failures: dict[str, str]
    """Why it cannot serve a model, by the models' names."""


def quieten() -> None:
    """Have Ray and Serve say nothing of their own in this process but errors."""
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def start_serve() -> None:
    """Have Serve run, without proxies if it does not yet."""
    quieten()
    serve.start(proxy_location="Disabled")


def router_views(application: str) -> list[RouterView]:
    """Return what each router says; none while one starts or ends."""
    try:
        told = serve.get_app_handle(application).broadcast("describe").results(timeout_s=CALL_TIMEOUT_S)
    except (ray.exceptions.RayError, RayServeException, TimeoutError):
        return []
    return [RouterView(**each) for each in told]


class Deployment:
    """The application of `config`. `variables` is what the processes of that Ray have in their environment anyway."""

    def __init__(self, config: ClusterConfig, variables: Mapping[str, str]) -> None:
        self._config = config
        self._name = config.serve.app
        needed = forwarded(os.environ)
        self._environ = None if needed.items() <= variables.items() else os.environ
        self._is_deployed = False
        self._before: ApplicationView | None = None
        self._deployed_at = 0.0
        self._has_routers = False
        self._signal: SignalSource | None = None

    def deploy(self) -> None:
        """Hand the application to Serve, which puts it there or changes what is there, step by step; returns before
        anything of it runs."""
        self._before = look(self._name)
        there = {} if self._before is None else self._before.deployments
        self._signal = ensure_signal(ClusterBoot.of(self._config), self._name, self._environ)
        application = app.build(
            self._config,
            cores=app.cores_of_node(),
            secret=ensure_secret(),
            environ=self._environ,
            targets={name: each.target for name, each in there.items()},
            versions=versions(self._name, there),
            failed=[name for name, each in there.items() if each.failure is not None],
        )
        self._is_deployed = True
        self._deployed_at = time.monotonic()
        serve.run_many(
            [serve.RunTarget(application, name=self._name, route_prefix=None)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )

    def await_ready(self, note: Callable[[ApplicationView], None] = lambda _: None) -> list[RouterView]:
        """Wait until Serve has started what was deployed, nothing is left of what it replaces, and every router has all
        replicas; return the routers. `note` is told how it stands, again and again.

        Of several models, some may have failed. Raises StartupError saying what went wrong, or what is missing.
        """
        end = time.monotonic() + self._config.serve.start_timeout_s
        while True:
            view = look(self._name)
            if view is not None:
                note(view)
                if self._is_settled(view) and (routers := self._complete(view)):
                    return routers
            if time.monotonic() >= end:
                raise StartupError(f"not ready after {self._config.serve.start_timeout_s:g} s: {view}")
            time.sleep(POLL_S)

    def _is_settled(self, view: ApplicationView) -> bool:
        """Whether everything runs but for models that have failed. Raises StartupError if none is left."""
        if view.status == DEPLOYING and self._before is not None and view.deployments == self._before.deployments:
            return False  # the controller has yet to look at the change
        failures = {name: failure for name, each in view.deployments.items() if (failure := each.failure) is not None}
        if time.monotonic() < self._deployed_at + STALE_S and any(map(self._was_there, failures.items())):
            return False  # nor has it taken back what it said of a former one
        if failures and (app.ROUTER in failures or len(failures) >= len(view.deployments) - 1):
            raise failures.get(app.ROUTER) or next(iter(failures.values()))
        if view.status == FAILED and not failures:
            raise StartupError(f"the application does not start: {view.message}")
        others = [each for name, each in view.deployments.items() if name not in failures]
        return view.status == RUNNING or (bool(failures) and all(each.status in SETTLED for each in others))

    def _was_there(self, failure: tuple[str, StartupError]) -> bool:
        """Whether a deployment had failed in the same way before."""
        name, error = failure
        before = None if self._before is None else self._before.deployments.get(name)
        return before is not None and str(before.failure) == str(error)

    def _complete(self, view: ApplicationView) -> list[RouterView]:
        """Return the routers if there are all and each has all replicas, else none. Raises StartupError if a router
        refuses a replica."""
        views = router_views(self._name)
        workers = self._to_be_reached(view, views)
        self._has_routers = self._has_routers or bool(views)
        for replica in (replica for each in views for replica in each.replicas):
            if replica["state"] == "refused" and replica["id"] in workers:
                raise StartupError(f"a router refuses the replica {replica['id']}: {replica['detail']}")
        has_all = all(
            workers <= {replica["id"] for replica in each.replicas if replica["state"] == "ready"} for each in views
        )
        return views if has_all and len(views) == len(view.deployments[app.ROUTER].running) else []

    def _to_be_reached(self, view: ApplicationView, routers: Sequence[RouterView]) -> frozenset[str]:
        """Return the replicas that every router must have: not those of a model that some router cannot serve."""
        failed = {app.worker_name(self._config, model) for router in routers for model in router.failures}
        workers = view.deployments.keys() - failed - {app.ROUTER}
        return frozenset().union(*(view.deployments[name].running for name in workers))

    def failures(self) -> dict[str, str]:
        """Return why the replicas of models do not start, by the models' names."""
        view = look(self._name)
        found = {} if view is None else {name: each.failure for name, each in view.deployments.items()}
        names = {name: app.worker_name(self._config, name) for name in self._config.deployments()}
        return {name: str(failure) for name, group in names.items() if (failure := found.get(group)) is not None}

    def remove(self, *, is_hurried: Callable[[], bool]) -> None:
        """Let running requests finish and take the application away; do not wait for either when hurried. Never raises.

        No call of ours is under way afterwards, unless Ray does not answer: one that finds Ray gone would end the
        process with an error.
        """
        if not self._is_deployed:
            return
        if self._has_routers:
            _attempt(self._drain, self._config.router.drain_grace_s + CALL_TIMEOUT_S, is_hurried)
        _attempt(self._delete, DELETE_TIMEOUT_S, is_hurried)

    def _drain(self, is_over: Callable[[], bool]) -> None:
        drained = serve.get_app_handle(self._name).broadcast("drain")
        while not is_over():
            with suppress(TimeoutError):
                drained.results(timeout_s=POLL_S)
                return

    def _delete(self, is_over: Callable[[], bool]) -> None:
        serve.delete(self._name, _blocking=False)
        while self._name in serve.status().applications and not is_over():
            time.sleep(POLL_S)
        if self._signal is not None:
            self._signal.end()


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
