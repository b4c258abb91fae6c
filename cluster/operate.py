"""Changes to a cluster that runs: another configuration, a replica that is to go, another number of replicas.

    apply   Serve starts new routers and replicas beside the old ones, which end as at a drain, and only those whose
            configuration has changed; a change that does not start leaves the old ones serving
    scale   `octavo-signal` is told how many replicas a model shall have, until it is told that load decides again
    drain   one more replica is started, then the one that is meant takes nothing new, hands over what it has not
            finished within `router.drain_grace_s`, and goes

Ray is connected. Serve and the actor do the work, so it goes on when the command that began it has ended.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ray import serve

from cluster.app import ROUTER, WORKER
from cluster.config import ClusterConfig
from cluster.deployment import CALL_TIMEOUT_S, Deployment, router_views, start_serve
from cluster.lifecycle import reserved_port
from cluster.policy import actor_name
from cluster.serve_view import ApplicationView, DeploymentView, Progress, look
from cluster.signal import SignalSource
from router.signal import ModelOutlook
from workers.errors import ConfigError, StartupError

POLL_S = 0.2
ROOM_S = 30.0
"""How long one more replica may wait for a node with room before a drain goes on without it."""
SETTLE_S = 1.0
"""What was deployed is looked at again after this: Serve's controller asks how many replicas there shall be, and hears
of another number a moment after it has what it had before."""
Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What an apply led to."""

    event: str = "applied"
    address: str
    """Of all routers."""
    routers: list[str]
    """The address of each alone."""
    models: list[str]
    replicas: list[dict[str, Any]]
    """Of each its "id", "pid" and whether it "is_new"."""
    started: list[str]
    """New routers and replicas, by id."""
    stopped: list[str]
    """Those that have gone."""


def apply(config: ClusterConfig, variables: Mapping[str, str], note: Note) -> Applied:
    """Have the cluster be what `config` says, and return when it is; one that is not there yet is put there, and stays.

    `variables`: see `Deployment`. A port of 0 is the one that is in use. Raises StartupError when it does not get so.
    """
    start_serve()
    before = look(config.serve.app)
    with _port(config, before) as port:
        bound = dataclasses.replace(config, serve=dataclasses.replace(config.serve, port=port))
        deployment = Deployment(bound, variables)
        note(f"{'deploying' if before is None else 'changing'} the application {config.serve.app}")
        deployment.deploy()
        last, progress = [before], Progress(before, note)

        def watch(view: ApplicationView) -> None:
            last[0] = view
            progress(view)

        deployment.await_ready(watch)
        time.sleep(SETTLE_S)
        routers = deployment.await_ready(watch)
    after = last[0]
    assert after is not None
    for name, each in after.deployments.items():
        if each.failure is not None:
            raise StartupError(f"{name} does not start, and what it had goes on: {each.failure}")
    old = frozenset() if before is None else before.replica_ids
    return Applied(
        address=routers[0].address,
        routers=[each.own_address for each in routers],
        models=routers[0].models,
        replicas=[
            {"id": each["id"], "pid": each["pid"], "is_new": each["id"] not in old} for each in routers[0].replicas
        ],
        started=sorted(after.replica_ids - old),
        stopped=sorted(old - after.replica_ids),
    )


@contextmanager
def _port(config: ClusterConfig, before: ApplicationView | None) -> Iterator[int]:
    """Yield the port that routers are to listen on, and keep others off it meanwhile, unless they listen there
    already."""
    addresses = {each.address for each in router_views(config.serve.app)} if before is not None else set()
    ports = {int(address.rpartition(":")[2]) for address in addresses}
    if len(ports) == 1 and config.serve.port in {0, *ports}:
        yield ports.pop()
        return
    with reserved_port(config) as port:
        yield port


def scale(application: str, model: str, num_replicas: int | None, *, timeout_s: float, note: Note) -> None:
    """Have `num_replicas` of `model` whatever the load is, and wait until there are; None: as configured again.

    Raises ConfigError for a model that there is not, StartupError if it takes longer than `timeout_s`.
    """
    source = SignalSource(actor_name(application))
    _outlook(source, model)
    source.scale(model, num_replicas)
    if num_replicas is None:
        note(f"{model} has as many replicas again as its configuration and its load say: {_bounds(source, model)}")
        return
    name, end, said = _deployment_of(_there(application), model), time.monotonic() + timeout_s, ""
    while True:
        deployment = _there(application).deployments[name]
        if (text := str(deployment)) != said:
            note(f"{name}: {text}")
            said = text
        if deployment.target == len(deployment.running) == len(_ready(application, deployment)) == num_replicas:
            note(f"{model} has {num_replicas} replicas")
            return
        if deployment.failure is not None:
            raise StartupError(f"{name} does not start: {deployment.failure}")
        if time.monotonic() >= end:
            raise StartupError(f"{model} has not {num_replicas} replicas after {timeout_s:g} s: {deployment}")
        time.sleep(POLL_S)


def drain(application: str, replica: str, *, timeout_s: float, note: Note) -> str:
    """Have a replica, named by its id or its beginning, replaced; returns its id when it has gone.

    Raises ConfigError if there is no such replica, or several, StartupError if it takes longer than `timeout_s`.
    """
    view = _there(application)
    name, replica_id = view.find(replica, among=view.deployments.keys() - {ROUTER})
    with _one_more(application, name, timeout_s=timeout_s, note=note):
        told = serve.get_deployment_handle(name, application).broadcast("drain", replica_id)
        if not any(told.results(timeout_s=CALL_TIMEOUT_S)):
            raise StartupError(f"the replica {replica_id} has gone meanwhile")
        note(f"{replica_id} takes nothing new")
        end = time.monotonic() + timeout_s
        late = f"{replica_id} is still there after {timeout_s:g} s"
        _await(lambda: replica_id not in _there(application).deployments[name].running, end, late)
    _await(lambda: replica_id not in _there(application).replica_ids, end, late)
    return replica_id


@contextmanager
def _one_more(application: str, name: str, *, timeout_s: float, note: Note) -> Iterator[None]:
    """Have one more replica of a deployment for the scope, so that the others need not carry what one of them did; go
    without it if there is no room."""
    source = SignalSource(actor_name(application))
    deployment = _there(application).deployments[name]
    try:
        model = _model_of(application, name)
        override = _outlook(source, model).override
        source.scale(model, deployment.target + 1)
    except (ConnectionError, TimeoutError) as error:
        note(f"no replica is started before: {error}")
        yield
        return
    try:
        note(f"{name}: one more replica is started before")
        if not _has_more(application, name, deployment, time.monotonic() + timeout_s):
            note(f"{name}: there is no room for one more replica, or it does not get ready")
        yield
    finally:
        # The number that was there, and then who decided on it: given back at once, a number that load has decided on
        # would stay at one more until load has done with less for long enough.
        source.scale(model, deployment.target)
        end = time.monotonic() + CALL_TIMEOUT_S
        while _there(application).deployments[name].target > deployment.target and time.monotonic() < end:
            time.sleep(POLL_S)
        source.scale(model, override)


def _has_more(application: str, name: str, before: DeploymentView, end: float) -> bool:
    """Wait until a deployment has more replicas that are ready than `before`; return whether it has. False as well when
    after `ROOM_S` none has found a place."""
    old, no_room_at = {replica.id for replica in before.replicas}, time.monotonic() + ROOM_S
    while time.monotonic() < end:
        now = _there(application).deployments[name]
        if len(_ready(application, now)) > len(before.running):
            return True
        has_place = any(replica.has_place for replica in now.replicas if replica.id not in old)
        if not has_place and time.monotonic() >= no_room_at:
            return False
        time.sleep(POLL_S)
    return False


def _there(application: str) -> ApplicationView:
    view = look(application)
    if view is None:
        raise StartupError(f"that Ray runs no application {application}")
    return view


def _deployment_of(view: ApplicationView, model: str) -> str:
    """Return the name of the deployment that computes `model`."""
    return name if (name := f"{WORKER}-{model}") in view.deployments else WORKER


def _model_of(application: str, name: str) -> str:
    """Return the model that a deployment computes. Raises ConnectionError if no router says."""
    if name != WORKER:
        return name.removeprefix(f"{WORKER}-")
    models = {model for view in router_views(application) for model in (*view.models, *view.failures)}
    if len(models) != 1:
        raise ConnectionError(f"routers know {len(models)} models of {name}")
    return models.pop()


def _ready(application: str, deployment: DeploymentView) -> frozenset[str]:
    """Return the replicas of a deployment that every router can send to."""
    views = router_views(application)
    ready = [{each["id"] for each in view.replicas if each["state"] == "ready"} for view in views]
    return deployment.running.intersection(*ready) if ready else frozenset()


def _outlook(source: SignalSource, model: str) -> ModelOutlook:
    models = source.view().models
    if model not in models:
        raise ConfigError(f"MODEL must be one of {', '.join(sorted(models)) or 'no model'}, is {model!r}")
    return models[model]


def _bounds(source: SignalSource, model: str) -> str:
    outlook = _outlook(source, model)
    bounds = sorted({outlook.min_replicas, outlook.max_replicas})
    return " to ".join(map(str, bounds))


def _await(holds: Callable[[], bool], end: float, what: str) -> None:
    while not holds():
        if time.monotonic() >= end:
            raise StartupError(what)
        time.sleep(POLL_S)
