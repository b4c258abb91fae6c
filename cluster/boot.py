"""What Router and Worker are given so that they read neither environment nor configuration: a picklable `Boot`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from cluster import telemetry
from cluster.config import LogConfig
from workers.types import ModelFiles


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
