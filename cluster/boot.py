"""What Router and Worker are given so that they read neither environment nor configuration: a picklable `Boot`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cluster import telemetry
from cluster.config_sections import LogConfig
from cluster.grpc_environment import grpc_environment
from cluster.secret import SECRET_FILE
from workers.types import ModelFiles

FORWARDED = ("OTEL_", "RAY_SERVE_", "OCTAVO_CACHE_DIR", SECRET_FILE)
"""Beginnings of the variables that replicas and routers get from the process that builds the application: those that
they read. Others would make them other processes, which start anew when the application is built from another shell."""
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0"}
"""One event loop a process: a second grpc.aio loop costs threads, hand-overs and log noise."""


@dataclass(frozen=True, slots=True)
class ClusterBoot:
    """Implements `workers.types.Boot` from the environment of the process that it finds itself in."""

    log: LogConfig

    def start_process(self, role: str) -> Callable[[], None]:
        """Set up tracing and logging for `role`; call what is returned before the process ends."""
        return telemetry.start(role, os.environ, self.log)

    def model_files(self, name: str) -> ModelFiles:
        """Return a model's files in this node's cache, fetched first if need be. Blocks. Raises ModelFileError."""
        from cluster.model_cache import ModelCache
        from cluster.model_fake import FAKE, fake_files
        from cluster.models import fetch_model

        return fake_files(ModelCache()) if name == FAKE else fetch_model(name)


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that routers and replicas are started with."""
    own = ONE_LOOP | grpc_environment(environ)
    return own | {name: value for name, value in environ.items() if name.startswith(FORWARDED)}
