"""The tools of chaos: packets that are dropped between two processes, a collector that is dead or mute."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import grpc.aio
import pytest

from load_tests.chaos.collector import Collector
from load_tests.chaos.partition import cut

SERVER = """
import socket
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
ends = []
while True:
    end, _ = listener.accept()
    ends.append(end)
    end.sendall(b"hello")
    if len(ends) == 2:
        break
for end in ends:
    while data := end.recv(64):
        end.sendall(data)
"""
"""Greets two clients, and then echoes what they say, one after the other."""


@contextmanager
def echo_server() -> Iterator[tuple[int, int]]:
    """A process that echoes: its pid and port."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.pid, int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=10.0)
    assert client.recv(64) == b"hello"
    return client


def test_a_cut_drops_packets_both_ways_and_new_connections_until_it_is_over() -> None:
    with echo_server() as (pid, port), connect(port) as client:
        try:
            with cut(os.getpid(), pid, port) as connections:
                assert connections == 1
                client.sendall(b"ping")
                client.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    client.recv(64)
                with pytest.raises(TimeoutError):
                    socket.create_connection(("127.0.0.1", port), timeout=0.3)
        except PermissionError:
            pytest.skip("this system lets nobody borrow a socket of its own child")
        with connect(port):
            client.settimeout(10.0)
            assert client.recv(64) == b"ping", "TCP sent again what had been lost"


def test_who_is_not_connected_cannot_be_cut_off() -> None:
    with (
        echo_server() as (pid, port),
        pytest.raises(LookupError, match=f"no connection to port {port}"),
        cut(os.getpid(), pid, port),
    ):
        pass


async def export(endpoint: str, timeout_s: float) -> grpc.StatusCode:
    options = [("grpc.use_local_subchannel_pool", 1)]  # one that met a dead collector would wait before it tries again
    async with grpc.aio.insecure_channel(endpoint.removeprefix("http://"), options=options) as channel:
        call = channel.unary_unary("/opentelemetry.proto.collector.trace.v1.TraceService/Export")
        try:
            assert await call(b"spans", timeout=timeout_s) == b""
        except grpc.aio.AioRpcError as error:
            return error.code()
        return grpc.StatusCode.OK


async def test_a_collector_serves_and_is_dead_or_mute_for_a_while() -> None:
    async with Collector() as collector:
        endpoint = collector.endpoint
        assert await export(endpoint, 10.0) is grpc.StatusCode.OK
        async with collector.dead():
            assert await export(endpoint, 10.0) is grpc.StatusCode.UNAVAILABLE
        with collector.mute():
            assert await export(endpoint, 1.5) is grpc.StatusCode.DEADLINE_EXCEEDED
        assert collector.num_unanswered == 1
        assert await export(endpoint, 10.0) is grpc.StatusCode.OK
        assert collector.num_exports == 2
    assert not asyncio.all_tasks() - {asyncio.current_task()}
