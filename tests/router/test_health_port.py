"""The port that says in plain text how a router is: the same as the public port says over TLS, and nothing else."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.v1 import status_service_pb2
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

from load_tests.rigs.certificates import Authority
from router.config import RouterConfig
from router.health_port import HealthPort
from router.server import RouterServer
from tests.router.rig import FakeBackend, running, served_model
from workers.errors import ConfigError, StartupError

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def said(channel: grpc.aio.Channel) -> int:
    answer: Any = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return int(answer.status)


async def test_beside_a_public_port_with_tls_it_needs_none_and_follows_the_drain(tmp_path: Path) -> None:
    certificate, key = Authority().server().write(tmp_path, "server")
    async with running(tls_cert_file=certificate, tls_key_file=key) as rig:
        probed = HealthPort(rig.server.health.servicer, "127.0.0.1", 0)
        await probed.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{probed.port}") as channel:
            assert await said(channel) == SERVING
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await StatusServiceStub(channel).GetStatus(status_service_pb2.GetStatusRequest(), timeout=10)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
            await rig.server.drain(1.0)
            assert await said(channel) == NOT_SERVING
        await probed.stop()
        await probed.stop()


async def test_routers_of_one_node_share_it() -> None:
    def server() -> RouterServer:
        return RouterServer(RouterConfig(), {"toy": served_model()}, FakeBackend(), router_id="r", version="0")

    routers = [server(), server()]
    first = HealthPort(routers[0].health.servicer, "127.0.0.1", 0)
    second = HealthPort(routers[1].health.servicer, "127.0.0.1", first.port)
    assert second.port == first.port
    await asyncio.gather(*(each.stop() for each in (first, second, *routers)))


async def test_a_port_of_somebody_else_ends_the_start() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = RouterServer(RouterConfig(), {"toy": served_model()}, FakeBackend(), router_id="r", version="0")
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port} \(router\.health_port\): the port is in use"):
            HealthPort(server.health.servicer, "127.0.0.1", port)
        await server.stop()


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port(port: int) -> None:
    with pytest.raises(ConfigError, match=rf"router\.health_port must be in \[0, 65535\], is {port}"):
        RouterConfig(health_port=port).check()
