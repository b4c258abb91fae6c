"""How gRPC's core is set up in routers and replicas."""

from __future__ import annotations

import os
import subprocess
import sys

from cluster.boot import forwarded
from cluster.grpc_environment import EXPERIMENTS, LEAN

ECHO = """
import asyncio, grpc, grpc.aio
async def echo(request, context):
    return request
async def main():
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("s", {"m": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        assert await channel.unary_unary("/s/m")(b"x") == b"x"
    await server.stop(None)
asyncio.run(main())
"""


def traced(environ: dict[str, str]) -> str:
    """Return what gRPC's core tells of an exchange on loopback in a process with this environment."""
    trace = {"GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "tcp,event_engine_endpoint"}
    environ = {name: value for name, value in os.environ.items() if name != EXPERIMENTS} | trace | environ
    run = subprocess.run(
        [sys.executable, "-c", ECHO], env=environ, capture_output=True, text=True, timeout=150, check=True
    )
    return run.stderr


def test_routers_and_replicas_do_without_grpc_s_event_engine() -> None:
    assert "posix_endpoint.cc" in traced({})
    told = traced(forwarded({}))
    assert "posix_endpoint.cc" not in told
    assert "tcp_posix.cc" in told
    assert "Unknown experiment" not in told


def test_an_operator_s_choice_stays() -> None:
    assert forwarded({})[EXPERIMENTS] == LEAN
    assert forwarded({EXPERIMENTS: "call_tracer_in_transport"})[EXPERIMENTS] == "call_tracer_in_transport"
    assert forwarded({EXPERIMENTS: ""})[EXPERIMENTS] == ""
