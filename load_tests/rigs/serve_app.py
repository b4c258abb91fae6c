"""An ordinary Ray Serve application that answers octavo.v1 Generate, to compare Octavo's cost per token with.

    client -- gRPC, a message a token --> router (an actor) -- a Serve handle's stream, an item a token --> model

The model deployment is a fake engine: each step gives every running request one token. Neither tokenizer nor limits,
accounts, stop strings or deadlines: what it does less is in its favour. `python -m load_tests.rigs.serve_app` starts a
Ray of its own, prints {"address"} and ends at SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2

from cluster.config_sections import RayConfig
from cluster.ray_connection import connected

MAX_ONGOING = 256


class Model:
    """The deployment."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._running: dict[object, asyncio.Queue[int]] = {}
        self._steps: asyncio.Task[None] | None = None

    async def generate(self, prompt: list[int], max_tokens: int) -> AsyncIterator[int]:
        if self._steps is None:
            self._steps = asyncio.create_task(self._run())
        key, tokens = object(), asyncio.Queue[int]()
        self._running[key] = tokens
        try:
            for _ in range(max_tokens):
                yield await tokens.get()
        finally:
            del self._running[key]

    async def _run(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(self._step_s)
            number += 1
            for tokens in self._running.values():
                tokens.put_nowait(300 + number % 700)


class Router:
    """The actor in front: a gRPC server that asks the deployment through its handle."""

    def __init__(self, handle: Any) -> None:
        self._generate = handle.options(stream=True).generate
        self._server: grpc.aio.Server | None = None

    async def start(self) -> str:
        service = "octavo.v1.InferenceService"
        generate = grpc.unary_stream_rpc_method_handler(
            self.generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
        )
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {"Generate": generate})])
        port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()
        return f"127.0.0.1:{port}"

    async def generate(self, request: pb.GenerateRequest, _: Any) -> AsyncIterator[pb.GenerateResponse]:
        async for token in self._generate.remote(list(request.prompt.token_ids.ids), request.max_tokens):
            yield pb.GenerateResponse(deltas=[types_pb2.Delta(token_ids=[token], text=" word")])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m load_tests.rigs.serve_app")
    parser.add_argument("--step-ms", type=float, default=5.0, help="how long a step takes")
    arguments = parser.parse_args()

    def end(*_: object) -> None:
        sys.exit(0)

    with connected(RayConfig(), lambda text: print(text, file=sys.stderr)):
        import ray  # not before `connected` has said how: Ray reads its variables when it is imported
        from ray import serve

        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(max_ongoing_requests=MAX_ONGOING)(Model)
        handle = serve.run(deployment.bind(arguments.step_ms / 1e3), name="compared", route_prefix=None)
        router = ray.remote(num_cpus=0, max_concurrency=MAX_ONGOING)(Router).remote(handle)
        address = ray.get(router.start.remote())
        signal.signal(signal.SIGTERM, end)
        print(json.dumps({"address": address}), flush=True)
        try:
            signal.pause()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            serve.shutdown()


if __name__ == "__main__":
    main()
