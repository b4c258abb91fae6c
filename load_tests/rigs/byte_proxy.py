"""A process that passes the bytes of a stream on, in grpc.aio and with nothing of a router: what that much costs.

    in    HOST:PORT, a line: where each stream leads
    out   HOST:PORT, a line: it serves
    in    end of file: end, also when the parent died

    with ByteProxy(target) as proxy: ... proxy.address ...

A router can hardly add less to a first token than this does, as long as both are made of grpc.aio.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from typing import Any, Self

import grpc
import grpc.aio
import uvloop

from cluster.grpc_environment import process_environment
from load_tests.rigs.router_rig import ROOT, STOP_S


class ByteProxy:
    """Runs from `__enter__` to `__exit__`."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._process: subprocess.Popen[str]
        self.address = ""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "load_tests.rigs.byte_proxy"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=process_environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(self._target + "\n")
        self._process.stdin.flush()
        self.address = self._process.stdout.readline().strip()
        if not self.address:
            self.__exit__()
            raise RuntimeError("the proxy did not start; it says above why")
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class _PassOn(grpc.GenericRpcHandler):
    """Takes every call for a stream of messages both ways, and leads it to the same method over `channel`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any]:
        method = handler_call_details.method

        async def serve(_requests: object, context: Any) -> None:
            call = self._channel.stream_stream(method)()
            forth = asyncio.create_task(_copy(context, call))
            try:
                await _copy(call, context)
            finally:
                forth.cancel()
                call.cancel()

        return grpc.stream_stream_rpc_method_handler(serve)


async def _copy(source: Any, sink: Any) -> None:
    while (message := await source.read()) is not grpc.aio.EOF:
        await sink.write(message)


async def _serve() -> None:
    target = sys.stdin.readline().strip()
    async with grpc.aio.insecure_channel(target) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_PassOn(channel),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(f"127.0.0.1:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        await server.stop(None)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which closes our standard input
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve())
