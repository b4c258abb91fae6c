"""What health checks hear: of the router and its services, and of each model as ``octavo.model/NAME``.

The router is SERVING while it takes requests, also while no replica is ready: they wait inside their deadlines. A model
is SERVING while a replica of it is ready, or while it has none on purpose and one is started for whoever comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from grpc_health.v1 import health, health_pb2

from router.model import Models, UnservedModel
from router.self_report import SelfReport

PREFIX: Final = "octavo.model/"
SERVING: Final = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """`services` are the names that share the router's own state, beside the empty one."""

    def __init__(self, services: Sequence[str], models: Models, about: SelfReport) -> None:
        self.servicer = health.aio.HealthServicer()
        self._services = ("", *services)
        self._models = models
        self._about = about
        self._is_serving = False
        self._told: dict[str, bool] = {}

    async def set_serving(self, is_serving: bool) -> None:
        """Tell whether this router takes requests."""
        self._is_serving = is_serving
        for service in self._services:
            await self._tell(service, is_serving)
        await self.refresh()

    async def refresh(self) -> None:
        """Tell how it stands with the models now."""
        for name in self._models:
            await self._tell(PREFIX + name, self._is_serving and self._serves(name))

    def _serves(self, name: str) -> bool:
        if isinstance(self._models[name], UnservedModel):
            return False
        if self._about.signal(name).num_ready:
            return True
        outlook = self._about.outlook.model(name)
        return outlook is not None and not outlook.target and outlook.max_replicas > 0 and not outlook.failure

    async def _tell(self, service: str, is_serving: bool) -> None:
        if self._told.get(service) != is_serving:
            self._told[service] = is_serving
            await self.servicer.set(service, SERVING if is_serving else NOT_SERVING)
