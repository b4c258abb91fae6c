"""A router's stream to a replica with nothing of a router behind it: one request, the message with its first token.

    async with DataPort(rig.replicas["replica-0"], "replica-0", rig.secret) as port:
        seconds = await port.ask(prompt)

It proves the cluster's secret as routers do. One token a request; not for many at once.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub

from load_tests.rigs.router_model import rig_manifest
from router.hello import RouterIdentity, shake_hands
from workers.handshake import ClusterKeys


class DataPort:
    """Attached while it is entered."""

    def __init__(self, address: str, replica_id: str, secret: bytes) -> None:
        manifest = rig_manifest()
        self._replica_id = replica_id
        self._identity = RouterIdentity(
            router_id="bare",
            epoch=time.time_ns(),
            keys=ClusterKeys.derive(secret),
            model_fingerprint=manifest.model_fingerprint,
            tokenizer_fingerprint=manifest.tokenizer_fingerprint,
        )
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._call: Any = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[float]] = {}
        self._reader: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        """Two tasks that write at once end a stream."""

    async def __aenter__(self) -> Self:
        self._call = DataPlaneServiceStub(self._channel).Attach()
        await shake_hands(self._call, self._identity, self._replica_id, credit=64)
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._reader is not None
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        self._call.cancel()
        await self._channel.close()

    async def ask(self, prompt: Sequence[int]) -> float:
        """Return when (monotonic) the message with the one token was there."""
        number = next(self._numbers)
        answered = self._waiting[number] = asyncio.get_running_loop().create_future()
        generate = pb.Generate(
            prompt_token_ids=prompt, max_tokens=1, n=1, sampling=pb.SamplingParams(top_p=1.0, repetition_penalty=1.0)
        )
        work = pb.Work(work_id=number, request_id=f"bare-{number}", attempt=1, generate=generate)
        await self._write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=number, work=[work])))
        return await answered

    async def _read(self) -> None:
        while (message := await self._call.read()) is not grpc.aio.EOF:
            if not message.HasField("step_batch"):
                continue
            now = time.monotonic()
            for delta in message.step_batch.deltas:
                answered = self._waiting.pop(delta.work_id, None)
                if answered is not None:
                    answered.set_result(now)
            await self._write(pb.AttachRequest(credit=pb.Credit(step_batches=1)))

    async def _write(self, message: pb.AttachRequest) -> None:
        async with self._writing:
            await self._call.write(message)
