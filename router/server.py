"""The router's front door: one grpc.aio server with every public service, health and reflection.

    bind   -> the ports that it will listen on, one call each
    start  -> SERVING
    drain  -> NOT_SERVING, new requests refused or sent to a successor, Sessions told to go away, running ones finish
    stop   -> what is left ends with UNAVAILABLE, the port is closed

Owns the order of these and the listening port; knows neither Ray nor replicas, only a `Backend`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from octavo.names import Reason
from octavo.v1 import inference_service_pb2, model_service_pb2, status_service_pb2
from octavo.v1.inference_service_pb2_grpc import add_InferenceServiceServicer_to_server
from octavo.v1.model_service_pb2_grpc import add_ModelServiceServicer_to_server
from octavo.v1.status_service_pb2_grpc import add_StatusServiceServicer_to_server

from router import status
from router.config import RouterConfig
from router.gauges import RouterGauges
from router.health import Health
from router.identity import Identities
from router.intake import Intake
from router.key_file import KeyFile
from router.model import Models
from router.observer import RequestObserver
from router.outlook import LastOutlook
from router.registrar import Registrar
from router.self_report import SelfReport
from router.servicer import InferenceServicer
from router.services import ModelServicer
from router.sessions import Sessions
from router.status_service import StatusServicer
from router.tls import server_credentials
from router.types import Backend
from workers.errors import OctavoError, StartupError

SERVICES = (
    inference_service_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
    status_service_pb2.DESCRIPTOR.services_by_name["StatusService"].full_name,
)
FAREWELL_S = 1.0
"""How long the last terminals may take to leave when a router stops."""
MIN_CLIENT_PING_S = 5.0
"""Clients that ping more often are cut off."""
NEVER_MS = 2**31 - 1
"""What gRPC takes for never, and the largest number that it takes."""


class RouterServer:
    """Make it on the event loop that it shall run on. Of `models` none may come or go afterwards; one that is unserved
    may become served.

    `so_reuseport`: whether other routers of this machine may listen on the same port; then a port that is in use by
    one of them goes unnoticed. `salt_key`: `ClusterKeys.tenant_salt`, needed if tenants are told apart.
    `outlook`: what is heard of other routers and of scaling, if anybody listens.

    Raises ConfigError if keys or certificates cannot be read.
    """

    def __init__(
        self,
        config: RouterConfig,
        models: Models,
        backend: Backend,
        *,
        router_id: str,
        version: str,
        so_reuseport: bool = False,
        salt_key: bytes = b"",
        outlook: LastOutlook | None = None,
    ) -> None:
        self._identities = identities = Identities(
            config.tenant_header,
            salt_key=salt_key,
            keys=KeyFile(Path(config.keys_file)) if config.keys_file else None,
            has_certificates=bool(config.tls_client_ca_file),
        )
        self._intake = Intake(config, models, backend, router_id=router_id, identities=identities)
        self._sessions = Sessions(self._intake, identities)
        self._config = config
        server_credentials(config)  # what is wrong with the files is said now
        self._max_message_bytes = config.max_message_bytes
        self._server = grpc.aio.server(options=_options(config, so_reuseport))
        self._is_bound = False
        self._leaving: asyncio.Task[None] | None = None
        self._add(add_InferenceServiceServicer_to_server, InferenceServicer(self._intake, self._sessions))
        model_servicer = ModelServicer(models, backend, self._intake.validator)
        self._add(add_ModelServiceServicer_to_server, model_servicer, identities.identify)
        self.about = SelfReport(
            self._intake, self._sessions, backend, models, router_id=router_id, outlook=outlook or LastOutlook()
        )
        self.health = Health(SERVICES, models, self.about)
        self._gauges = RouterGauges(backend, self.about, tuple(models), num_sessions=lambda: self._sessions.num_open)
        status_servicer = StatusServicer(models, self.about, self._intake, identities, version=version)
        self._add(add_StatusServiceServicer_to_server, status_servicer, identities.identify)
        self._add(health_pb2_grpc.add_HealthServicer_to_server, self.health.servicer, is_ours=False)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        self._add(reflection_pb2_grpc.add_ServerReflectionServicer_to_server, _Reflection(names), is_ours=False)

    @property
    def intake(self) -> Intake:
        """Where requests come in; knows how many were accepted and have ended."""
        return self._intake

    @property
    def keys(self) -> KeyFile | None:
        """The keys that callers need, if they do."""
        return self._identities.keys

    @property
    def sessions(self) -> Sessions:
        return self._sessions

    def observe(self, observer: RequestObserver) -> None:
        """Tell `observer`, instead of nobody, of requests that have ended. Before `start`."""
        self._intake.observer = observer

    def bind(self, host: str, port: int) -> int:
        """Listen on ``host:port`` (0: any free port) once started; return the port. May be called for several.

        Raises StartupError if that cannot be, for instance because the port is in use; ConfigError if certificates
        cannot be read.
        """
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        # For this port alone: gRPC binds no second one with credentials whose certificates may change.
        credentials = server_credentials(self._config)
        try:
            if credentials is None:
                bound = self._server.add_insecure_port(address)
            else:
                bound = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise StartupError(
                f"cannot listen on {address}: the port is in use, or the address is not this machine's"
            ) from error
        if bound == 0:
            raise StartupError(f"cannot listen on {address}")
        self._is_bound = True
        return bound

    async def start(self) -> None:
        """Serve; `stop` must follow."""
        assert self._is_bound
        self._intake.start()
        self._identities.start()
        if (metrics := self._intake.observer.metrics) is not None:
            self._gauges.start(metrics.meter)
        await self._server.start()
        await self.health.set_serving(True)

    async def drain(self, grace_s: float, *, has_successor: bool = False) -> bool:
        """Take nothing new and wait, at most `grace_s`, until every answer has reached its client; return whether all
        have. `stop` must follow.

        `has_successor`: another router listens on the public port, so ports are closed at once and clients are told on
        their connections to make others, for what they ask next; else they could reach this one again, for as long as
        it drains. gRPC cancels calls that cross this.
        """
        if has_successor and self._leaving is None:
            self._leaving = asyncio.create_task(self._server.stop(grace_s + FAREWELL_S), name="leaving")
            await asyncio.sleep(0)  # it closes the ports before what comes now is refused
        await self.health.set_serving(False)
        self._intake.is_draining = True
        self._sessions.go_away(grace_s, Reason.DRAINING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._intake.wait_idle()
                return True
        return False

    async def stop(self) -> None:
        """End what is left with UNAVAILABLE and close the ports. Takes at most about `FAREWELL_S`. Idempotent."""
        await self.health.set_serving(False)
        self._intake.is_draining = True
        self._intake.end_all()
        self._sessions.finish()
        await self._server.stop(FAREWELL_S)
        if self._leaving is not None:
            await self._leaving
        await self._sessions.stop()
        await self._intake.stop()
        await self._identities.stop()
        self._gauges.stop()

    def _add(
        self,
        add_to_server: Callable[[Any, Any], None],
        servicer: object,
        check: Callable[[Any], object] | None = None,
        *,
        is_ours: bool = True,
    ) -> None:
        """`check` refuses a call by raising; without one the servicer itself looks who calls, if anybody does.
        `is_ours`: its calls with many answers return the last one, see router/registrar.py."""
        add_to_server(servicer, Registrar(self._server, self._max_message_bytes, check, is_ours=is_ours))


class _Reflection(reflection.aio.ReflectionServicer):
    """Reflection that refuses what is no message, where gRPC's own fails."""

    async def ServerReflectionInfo(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        requests: Any = _messages(request_iterator, context)
        answers: Any = super().ServerReflectionInfo(requests, context)
        async for answer in answers:
            await context.write(answer)


async def _messages(requests: AsyncIterator[object], context: Any) -> AsyncIterator[object]:
    """Yield messages until one is none, with which the call ends."""
    async for request in requests:
        if isinstance(request, OctavoError):
            await status.abort(context, request)
        yield request


def _options(config: RouterConfig, so_reuseport: bool) -> list[tuple[str, int]]:
    keepalive_ms = int(config.keepalive_s * 1000)
    return [
        ("grpc.so_reuseport", int(so_reuseport)),
        # Somewhat larger ones are still taken in, so that they can be refused with a reason.
        ("grpc.max_receive_message_length", 2 * config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_calls),
        # gRPC refuses some of those between the two at random, and all that are larger.
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
        ("grpc.max_connection_age_ms", int(min(config.max_connection_age_s * 1000, NEVER_MS))),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", max(1_000, keepalive_ms // 2)),
        # A keepalive ping that waits for the answer to one of another kind has that one's limit, else a minute.
        ("grpc.http2.ping_timeout_ms", max(1_000, keepalive_ms // 2)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", int(MIN_CLIENT_PING_S * 1000)),
    ]
