"""Binds Router and Worker into one Ray Serve application and says what each of them may use.

`build` is for a process that has a `ClusterConfig`; `app` is the builder that ``serve deploy`` imports, whose `args`
are the configuration file's keys. Nothing here starts anything but the actor with the cluster's secret.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from cluster.boot import ClusterBoot, forwarded
from cluster.config import ClusterConfig, load
from cluster.secret import SecretSource, ensure_secret
from router.model import ModelSource
from router.serve import Router
from workers.serve import STOP_MARGIN_S, Worker

ROUTER = "Router"
WORKER = "Worker"
MAX_ONGOING_REQUESTS = 1_000
"""Only Serve's control calls count against it."""
MAX_START_ATTEMPTS = 3


def build(config: ClusterConfig, *, cores: float, secret: SecretSource, environ: Mapping[str, str] | None) -> Any:
    """Return the Serve application of `config` for nodes of `cores`.

    `environ` is what routers and replicas get variables from; None if Ray itself was started with them. Ray starts a
    process that is to have variables of its own twice, for the first one sets them: 0.8 s more on a small machine.
    """
    boot = ClusterBoot(config.log)
    environment = {} if environ is None else {"runtime_env": {"env_vars": forwarded(environ)}}
    stop_s = graceful_shutdown_timeout_s(config)
    common = {
        "max_ongoing_requests": MAX_ONGOING_REQUESTS,
        "graceful_shutdown_wait_loop_s": 0.2,
        "graceful_shutdown_timeout_s": stop_s,
        "health_check_period_s": config.replicas.health_check_period_s,
        "health_check_timeout_s": config.replicas.health_check_timeout_s,
        "max_constructor_retry_count": MAX_START_ATTEMPTS,
    }
    resources: dict[str, Any] = {"num_cpus": config.num_cpus(cores), "resources": dict(config.resources.custom)}
    if config.resources.memory_bytes:
        resources["memory"] = config.resources.memory_bytes
    worker = serve.deployment(
        name=WORKER,
        num_replicas=config.replicas.num_replicas,
        ray_actor_options=resources | environment,
        request_router_config=RequestRouterConfig(
            request_router_class="router.serve.MembershipRouter", request_router_kwargs={"group": WORKER}
        ),
        **common,
    )(Worker)
    router = serve.deployment(
        name=ROUTER, num_replicas=config.serve.num_routers, ray_actor_options={"num_cpus": 0} | environment, **common
    )(Router)
    workers = worker.bind(
        boot=boot,
        config=dataclasses.replace(
            config.engine, threads=config.threads(cores), replicas_per_node=config.replicas_per_node()
        ),
        model=config.model,
        secret=secret,
        graceful_shutdown_timeout_s=stop_s,
    )
    return router.bind(
        boot=boot,
        config=config.router,
        model=ModelSource(name=config.model, max_model_len=config.engine.max_model_len),
        listen=(config.serve.host, config.serve.port),
        secret=secret,
        group=WORKER,
        workers=workers,
        version=importlib.metadata.version("octavo"),
    )


def app(args: dict[str, Any]) -> Any:
    """Build the application on a Ray cluster for ``serve deploy``; `args` are the keys of the configuration file.

    Raises ConfigError.
    """
    config = load(None, os.environ, args)
    return build(config, cores=cores_of_node(), secret=ensure_secret(), environ=os.environ)


def graceful_shutdown_timeout_s(config: ClusterConfig) -> float:
    """Return how long Serve waits for a router or replica that it stops: the drain, and what comes after it."""
    return config.router.drain_grace_s + 2 * STOP_MARGIN_S


def cores_of_node() -> float:
    """Return the CPUs of the smallest node of the connected Ray that has any."""
    cores = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    return min((count for count in cores if count > 0), default=float(os.cpu_count() or 1))
