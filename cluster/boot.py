"""What Router and Worker are given so that they read neither environment nor configuration: a picklable `Boot`."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster import telemetry
from cluster.config import ClusterConfig, ModelConfig
from cluster.config_sections import LogConfig, TelemetryConfig
from cluster.grpc_environment import grpc_environment
from cluster.secret import SECRET_FILE
from workers.config import ENGINES_OF_OTHERS
from workers.types import ModelFiles, Process

FORWARDED = ("OTEL_", "RAY_SERVE_", "OCTAVO_CACHE_DIR", SECRET_FILE)
"""Beginnings of the variables that replicas and routers get from the process that builds the application: those that
they read. Others would make them other processes, which start anew when the application is built from another shell."""
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""One event loop a process: a second grpc.aio loop costs threads, hand-overs and log noise."""


@dataclass(frozen=True, slots=True)
class ClusterBoot:
    """Implements `workers.types.Boot` from the environment of the process that it finds itself in."""

    log: LogConfig
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    models_of_others: tuple[str, ...] = ()
    """Models that are served by engines with model code of others, so that their architecture may be any."""

    @classmethod
    def of(cls, config: ClusterConfig, *models: ModelConfig) -> ClusterBoot:
        """Return what a process is given that has to do with `models`, or with all of a cluster."""
        each = models or tuple(config.deployments().values())
        names = {model.model for model in each if model.engine.engine in ENGINES_OF_OTHERS}
        return cls(config.log, config.telemetry, tuple(sorted(names)))

    def start_process(self, role: str) -> Process:
        """Set up tracing, metrics and logging for `role`."""
        return telemetry.start(role, os.environ, self.log, self.telemetry, _node_host(self.telemetry.metrics_host))

    def model_files(self, name: str) -> ModelFiles:
        """Return a model's files in this node's cache, fetched first if need be. Blocks. Raises ModelFileError."""
        from cluster.model_cache import ModelCache
        from cluster.model_fake import FAKE, fake_files
        from cluster.models import fetch_model

        if name == FAKE:
            return fake_files(ModelCache())
        return fetch_model(name, any_architecture=name in self.models_of_others)


def _node_host(host: str) -> str:
    """Return where other nodes find what listens on `host` here."""
    try:
        is_every = ipaddress.ip_address(host.strip("[]")).is_unspecified
    except ValueError:
        return host
    if not is_every:
        return host
    import ray

    return str(ray.util.get_node_ip_address())


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that routers and replicas are started with."""
    own = ONE_LOOP | grpc_environment(environ)
    return own | {name: value for name, value in environ.items() if name.startswith(FORWARDED)}
