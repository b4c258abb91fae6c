"""A port that answers `grpc.health.v1` in plain text and nothing else, for who cannot speak the public port's TLS.

Kubernetes' gRPC probes are such. It says what the public port says, and nobody learns more from it than that. Knows no
other service and no identity.
"""

from __future__ import annotations

from typing import Final

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2_grpc

from workers.errors import StartupError

MAX_MESSAGE_BYTES: Final = 4_096
"""Of a question: the name of a service."""


class HealthPort:
    """Make it on the event loop that it shall run on; `servicer` is the one of the public port.

    Routers of one node share the port, so that a probe asks any of them. Raises StartupError if it is in use otherwise.
    """

    def __init__(self, servicer: health.aio.HealthServicer, host: str, port: int) -> None:
        options = [("grpc.so_reuseport", 1), ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        self._server = grpc.aio.server(options=options)
        health_pb2_grpc.add_HealthServicer_to_server(servicer, self._server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError as error:
            raise StartupError(f"cannot listen on {address} (router.health_port): the port is in use") from error

    async def start(self) -> None:
        """Answer; `stop` must follow."""
        await self._server.start()

    async def stop(self) -> None:
        """Close the port. Idempotent."""
        await self._server.stop(None)
