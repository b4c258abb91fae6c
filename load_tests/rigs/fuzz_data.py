"""Attacks the data plane over sockets, from both ends: strangers, a router that knows the secret, and such a replica.

A stranger must be shown out and learn nothing. Who has proved the secret may be wrong in everything it says: the other
end may refuse it, and must go on with everybody else's work.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import grpc
import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb

from load_tests.rigs.fuzz_public import MANGLED, PART_S, in_flight
from load_tests.rigs.fuzz_samples import HASHES, MODEL, attach_requests, step_batches
from load_tests.rigs.fuzz_tally import FuzzTally, status_of
from load_tests.rigs.message_mutator import Mutator, parsed
from workers.handshake import MIN_PROTOCOL, NONCE_BYTES, PROTOCOL, ClusterKeys, prove
from workers.prefix import PrefixHasher

SERVICE: Final = "octavo.internal.v1.DataPlaneService"
ATTACH: Final = f"/{SERVICE}/Attach"
STREAMS: Final = 8
MAX_MESSAGES: Final = 80
"""Of one stream."""
STREAM_S: Final = 5.0
BLOCK_SIZE: Final = 16
RECENT: Final = 16
"""Works that a hostile replica speaks of."""


class HostileRouter:
    def __init__(self, channel: grpc.aio.Channel, keys: ClusterKeys, mutator: Mutator, tally: FuzzTally) -> None:
        self._channel = channel
        self._keys = keys
        self._mutator = mutator
        self._tally = tally
        self._samples = [message.SerializeToString() for message in attach_requests()]
        self._epochs = itertools.count(time.time_ns())

    async def knock(self, number: int) -> None:
        """Say anything without a proof, so many times."""
        await in_flight([self._stranger for _ in range(number)], STREAMS)

    async def attack(self, number: int) -> None:
        """Send at least so many messages behind a proof."""
        end, give_up = self._tally.num_messages + number, time.monotonic() + PART_S

        async def one_after_another() -> None:
            while self._tally.num_messages < end and time.monotonic() < give_up:
                await self._proven()

        await asyncio.gather(*(one_after_another() for _ in range(STREAMS)))

    async def _stranger(self) -> None:
        call = self._channel.stream_stream(ATTACH)(timeout=STREAM_S)
        data = self._mutator.mutated(pb.AttachRequest, [*self._samples, self._hello(pb.Challenge(nonce=bytes(32)))])
        self._tally.sent()
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            await call.read()
            await call.write(data)
            if await call.read() is not grpc.aio.EOF:
                self._tally.failed("stranger", "was let in", [data])
        await self._end("stranger", call, [data])

    async def _proven(self) -> None:
        draw = self._mutator.random
        call = self._channel.stream_stream(ATTACH)()
        sent: list[bytes] = []
        reader: asyncio.Task[None] | None = None
        try:
            challenge = pb.AttachResponse.FromString(await call.read()).challenge
            await call.write(self._hello(challenge))
            reader = asyncio.create_task(_drain(call))
            for _ in range(draw.randint(1, MAX_MESSAGES)):
                sent.append(self._next())
                await call.write(sent[-1])
                if draw.random() < 0.1:
                    await asyncio.sleep(draw.choice((0.0, 0.002, 0.01)))
            if draw.random() < 0.5:
                await call.done_writing()
                await asyncio.wait((reader,), timeout=0.05)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # it has ended; with what, `_end` says
        finally:
            call.cancel()
            if reader is not None:
                await asyncio.wait((reader,))
        await self._end("hostile router", call, sent[-4:])

    def _hello(self, challenge: pb.Challenge) -> bytes:
        """Return a Hello with the right proof; what else it says may be anything now and then."""
        draw = self._mutator.random
        router_id, epoch = f"hostile-{draw.randrange(3)}", next(self._epochs)
        hello = pb.Hello(protocol=PROTOCOL, router_id=router_id, router_epoch=epoch)
        if draw.random() < 0.2:
            hello = self._mutator.message(pb.Hello)
        hello.proof = prove(
            self._keys.data_plane,
            nonce=challenge.nonce,
            replica_id=challenge.replica_id,
            router_id=hello.router_id,
            router_epoch=hello.router_epoch,
        )
        return pb.AttachRequest(hello=hello, credit=pb.Credit(step_batches=4)).SerializeToString()

    def _next(self) -> bytes:
        data = self._mutator.mutated(pb.AttachRequest, self._samples)
        if self._mutator.random.random() > MANGLED:
            while parsed(pb.AttachRequest, data) is None:
                data = self._mutator.mutated(pb.AttachRequest, self._samples)
        self._tally.sent()
        return data

    async def _end(self, target: str, call: Any, messages: Sequence[bytes]) -> None:
        code, text = await status_of(call)
        self._tally.ended(target, code, messages, text)


class HostileReplica:
    """A data port under the name `replica_id`; `start` it, have routers dial `address`, `stop` it.

    What it says is counted and otherwise judged by what becomes of its router: nothing there may break.
    """

    def __init__(self, replica_id: str, keys: ClusterKeys, mutator: Mutator, tally: FuzzTally) -> None:
        self.replica_id = replica_id
        self._keys = keys
        self._mutator = mutator
        self._tally = tally
        self._works: deque[int] = deque([1], maxlen=RECENT)
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)))
        self.address = ""

    async def start(self) -> None:
        handler = grpc.stream_stream_rpc_method_handler(self._attach)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Attach": handler}),))
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0.0)

    async def _attach(self, _requests: Any, context: Any) -> None:
        """One stream of a router; gRPC cancels it when the router has enough of it."""
        draw = self._mutator.random
        challenge = pb.Challenge(
            nonce=draw.randbytes(NONCE_BYTES),
            replica_id=self.replica_id,
            min_protocol=MIN_PROTOCOL,
            max_protocol=PROTOCOL,
        )
        await context.write(self._perhaps(pb.AttachResponse(challenge=challenge), 0.05))
        if await context.read() is grpc.aio.EOF:
            return
        await context.write(self._perhaps(pb.AttachResponse(hello_ack=self._ack()), 0.2))
        reader = asyncio.create_task(self._read(context))
        self._tally.codes["hostile replica: attached"] += 1
        try:
            for _ in range(draw.randint(1, MAX_MESSAGES)):
                await context.write(self._next())
                await asyncio.sleep(draw.choice((0.0, 0.0, 0.0, 0.001)))
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _read(self, context: Any) -> None:
        """Learn which works this replica is to speak of."""
        while (data := await context.read()) is not grpc.aio.EOF:
            message = pb.AttachRequest.FromString(data)
            self._works.extend(work.work_id for work in message.dispatch.work)

    def _ack(self) -> pb.HelloAck:
        hash_key = PrefixHasher(self._keys.prefix_hash, BLOCK_SIZE).key_fingerprint
        return pb.HelloAck(
            protocol=PROTOCOL,
            replica_id=self.replica_id,
            epoch=1,
            fingerprints=pb.Fingerprints(model=MODEL, tokenizer=MODEL, hash_key=hash_key),
            block_size=BLOCK_SIZE,
            num_blocks=64,
            capabilities=["generate", "logprobs", "logit_bias"],
            load=pb.Load(num_blocks=64, num_free_blocks=64, credit_tokens=4_096),
            resident=pb.KvEvents(cleared=True, stored=b"".join(HASHES)),
            model=MODEL,
        )

    def _perhaps(self, message: pb.AttachResponse, share: float) -> bytes:
        """Return a message of the handshake, changed now and then."""
        self._tally.sent()
        data = message.SerializeToString()
        return self._mutator.mutated(pb.AttachResponse, [data]) if self._mutator.random.random() < share else data

    def _next(self) -> bytes:
        self._tally.sent()
        self._mutator.numbers = list(self._works)
        samples = [message.SerializeToString() for message in step_batches(tuple(self._works))]
        data = self._mutator.mutated(pb.AttachResponse, samples)
        if self._mutator.random.random() > MANGLED:
            while parsed(pb.AttachResponse, data) is None:
                data = self._mutator.mutated(pb.AttachResponse, samples)
        return data


async def _drain(call: Any) -> None:
    with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
        while await call.read() is not grpc.aio.EOF:
            pass
