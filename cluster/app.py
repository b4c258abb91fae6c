"""Binds Router and one Worker for each model into one Ray Serve application and says what each of them may use.

`build` is for a process that has a `ClusterConfig`; `app` is the builder that ``serve deploy`` imports, whose `args`
are the configuration file's keys. Nothing here starts anything but the actors with the cluster's secret and its signal.

A deployment's version is a digest of what its processes are given: an application that is built again replaces the
processes of what has changed, and no others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.boot import ClusterBoot, forwarded
from cluster.config import ClusterConfig, ModelConfig, load
from cluster.policy import actor_name, model_scaling, router_scaling
from cluster.secret import SecretSource, ensure_secret
from cluster.signal import SignalSource, StartTeller, ensure_signal
from router.config import ObserverConfig, RouterSetup
from router.model import ModelSource
from router.serve import Router
from workers.serve import STOP_MARGIN_S, Worker

ROUTER = "Router"
WORKER = "Worker"
MAX_ONGOING_REQUESTS = 1_000
"""Only Serve's control calls count against it."""
MAX_START_ATTEMPTS = 3
SURGE_PERCENT = 25
"""Of its processes that a changed deployment starts before it stops as many old ones; one at least."""

NO_TARGETS: Mapping[str, int] = {}
NO_VERSIONS: Mapping[str, str] = {}


def build(
    config: ClusterConfig,
    *,
    cores: float,
    secret: SecretSource,
    environ: Mapping[str, str] | None,
    targets: Mapping[str, int] = NO_TARGETS,
    versions: Mapping[str, str] = NO_VERSIONS,
    failed: Collection[str] = (),
) -> Any:
    """Return the Serve application of `config` for nodes of `cores`.

    `environ` is what routers and replicas get variables from; None if Ray itself was started with them. Ray starts a
    process that is to have variables of its own twice, for the first one sets them: 0.8 s more on a small machine.
    `targets`, `versions`: of deployments that are there already, how many processes they have been told to have, and of
    which version. `failed`: those of them whose processes did not start; Serve has given up and tries again only what
    is new to it.
    """
    runtime_env = {} if environ is None else {"env_vars": forwarded(environ)}
    parts = _Parts(config, cores, secret, runtime_env, targets, versions, frozenset(failed))
    workers = {worker_name(config, name): parts.worker(name, model) for name, model in config.deployments().items()}
    return parts.router(workers)


def app(args: dict[str, Any]) -> Any:
    """Build the application on a Ray cluster for ``serve deploy``; `args` are the keys of the configuration file.

    Raises ConfigError.
    """
    config = load(None, os.environ, args)
    ensure_signal(ClusterBoot.of(config), config.serve.app, os.environ)
    return build(config, cores=cores_of_node(), secret=ensure_secret(), environ=os.environ)


def worker_name(config: ClusterConfig, model: str) -> str:
    """Return the name of the Serve deployment whose replicas compute `model`, one of ``config.deployments()``."""
    return f"{WORKER}-{model}" if config.models else WORKER


def graceful_shutdown_timeout_s(config: ClusterConfig) -> float:
    """Return how long Serve waits for a router or replica that it stops: the drain, and what comes after it."""
    return config.router.drain_grace_s + 2 * STOP_MARGIN_S


def cores_of_node() -> float:
    """Return the CPUs of the smallest node of the connected Ray that has any."""
    cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return min((count for count in cores if count > 0), default=float(os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class _Parts:
    """Makes the deployments of one application."""

    config: ClusterConfig
    cores: float
    secret: SecretSource
    runtime_env: dict[str, Any]
    targets: Mapping[str, int]
    versions: Mapping[str, str]
    failed: frozenset[str]

    @property
    def signal(self) -> SignalSource:
        return SignalSource(actor_name(self.config.serve.app))

    def worker(self, name: str, model: ModelConfig) -> Any:
        """Return the bound deployment of the replicas of `model`."""
        resources: dict[str, Any] = {
            "num_cpus": self.config.num_cpus(model, self.cores),
            "resources": dict(model.resources.custom),
        }
        if model.resources.memory_bytes:
            resources["memory"] = model.resources.memory_bytes
        if model.resources.num_gpus:
            resources["num_gpus"] = model.resources.num_gpus
        group = worker_name(self.config, name)
        deployment = serve.deployment(
            name=group,
            ray_actor_options=self._actor_options(resources, python=model.engine.python),
            autoscaling_config=model_scaling(
                name,
                model.scaling,
                num_replicas=model.initial_replicas,
                max_num_sequences=model.engine.max_num_sequences,
                target=self.targets.get(group),
                actor=self.signal.actor,
            ),
            request_router_config=RequestRouterConfig(
                request_router_class="router.serve.MembershipRouter", request_router_kwargs={"group": group}
            ),
            health_check_period_s=model.replicas.health_check_period_s,
            health_check_timeout_s=model.replicas.health_check_timeout_s,
            **self._common(),
        )(Worker)
        return self._bound(
            deployment,
            boot=ClusterBoot.of(self.config, model),
            config=self.config.engine_config(model, self.cores),
            model=model.model,
            secret=self.secret,
            graceful_shutdown_timeout_s=graceful_shutdown_timeout_s(self.config),
            progress=StartTeller(name, self.signal),
            name=name,
        )

    def router(self, workers: Mapping[str, Any]) -> Any:
        """Return the bound deployment of the routers. `workers`: bound deployments by their names."""
        config = self.config
        num_routers: dict[str, Any] = {"num_replicas": config.serve.num_routers}
        if not config.serve.num_routers:
            # Two on a node: one that starts and the one that it replaces.
            scaling = router_scaling(self.targets.get(ROUTER), actor=self.signal.actor)
            num_routers = {"autoscaling_config": scaling, "max_replicas_per_node": 2}
        deployment = serve.deployment(
            name=ROUTER,
            ray_actor_options=self._actor_options({"num_cpus": 0}),
            health_check_period_s=config.replicas.health_check_period_s,
            health_check_timeout_s=config.replicas.health_check_timeout_s,
            **num_routers,
            **self._common(),
        )(Router)
        models = tuple(
            ModelSource(
                name=name,
                files=model.model,
                group=worker_name(config, name),
                max_model_len=model.engine.max_model_len,
            )
            for name, model in config.deployments().items()
        )
        return self._bound(
            deployment,
            boot=ClusterBoot.of(config),
            setup=RouterSetup(
                config=config.router, observer=_observer(config), listen=(config.serve.host, config.serve.port)
            ),
            models=models,
            secret=self.secret,
            workers=dict(workers),
            version=_installed(),
            signal=self.signal,
        )

    def _actor_options(self, resources: dict[str, Any], *, python: str = "") -> dict[str, Any]:
        runtime_env = self.runtime_env | ({"py_executable": python} if python else {})
        return resources | ({"runtime_env": runtime_env} if runtime_env else {})

    def _common(self) -> dict[str, Any]:
        return {
            "max_ongoing_requests": MAX_ONGOING_REQUESTS,
            "max_surge_percent": SURGE_PERCENT,
            "rolling_update_percentage": 1.0,
            "graceful_shutdown_wait_loop_s": 0.2,
            "graceful_shutdown_timeout_s": graceful_shutdown_timeout_s(self.config),
            "max_constructor_retry_count": MAX_START_ATTEMPTS,
        }

    def _bound(self, deployment: Any, **given: Any) -> Any:
        """Bind `deployment` to what its processes are `given`, of which it gets its version. Serve compares the options
        of its actors by itself, and gives a deployment without a version a random one: all would start anew each time.
        """
        text = json.dumps([_installed(), given], sort_keys=True, default=_plain)
        digest = hashlib.sha256(text.encode(), usedforsecurity=False).hexdigest()[:16]
        last, _, attempts = self.versions.get(deployment.name, "").partition("-")
        # What did not start is tried once more under another name; what it was to replace keeps the one that it has.
        attempt = int(attempts or 0) + (deployment.name in self.failed) if last == digest else 0
        version = f"{digest}-{attempt}" if attempt else digest
        # Not public: the way that Serve itself uses to set it.
        return deployment.options(version=version, _internal=True).bind(**given)


def _observer(config: ClusterConfig) -> ObserverConfig:
    return ObserverConfig(
        max_kept_requests=config.telemetry.max_kept_requests,
        max_tenants=config.telemetry.max_tenants,
        logs_requests=config.log.requests,
        logs_prompts=config.log.prompts,
    )


def _plain(value: object) -> object:
    """Return what of `value` counts in a version. Of other deployments their names: they have versions of their own."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return {type(value).__qualname__: fields}
    return type(value).__qualname__ if isinstance(value, serve.Application) else repr(value)


def _installed() -> str:
    return importlib.metadata.version("octavo")
