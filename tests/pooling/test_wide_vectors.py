"""More numbers than a message of the data plane may carry, on their way to a router that takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub

from router import link
from tests.data_plane.rig import KEYS, until
from tests.data_plane.test_data_port import attach
from tests.workers.toy_engine import BLOCK_SIZE, toy_info
from workers import data_plane
from workers.data_plane import DataPlaneServer
from workers.outbox import MAX_DELTA_BYTES
from workers.pooling import PoolingEngine
from workers.prefix import PrefixHasher
from workers.thread import EngineThread
from workers.types import CAPABILITY_EMBED, CAPABILITY_POOL, PoolWork

WIDE = (0.5,) * (MAX_DELTA_BYTES // 4 * 9 // 10)
NUM_WORKS = 5


class Wide:
    def pool(self, works: Sequence[PoolWork]) -> list[tuple[float, ...]]:
        return [WIDE for _ in works]


def test_the_data_plane_has_room_for_more_than_its_deltas() -> None:
    assert data_plane.MAX_MESSAGE_BYTES == link.MAX_MESSAGE_BYTES == 4 * MAX_DELTA_BYTES


async def test_vectors_that_are_too_many_for_a_message_come_in_several() -> None:
    """They were merged into one, which gRPC refused to send: the stream ended, and with it all works on it."""
    info = replace(toy_info(1), capabilities=frozenset({CAPABILITY_EMBED, CAPABILITY_POOL}))
    engine = PoolingEngine(Wide(), info=info, hasher=PrefixHasher(bytes(32), BLOCK_SIZE))
    server = DataPlaneServer(replica_id="one", key=KEYS.data_plane)
    thread = EngineThread(engine, server.notify)
    await server.start(thread)
    options = [("grpc.max_receive_message_length", link.MAX_MESSAGE_BYTES)]
    try:
        async with grpc.aio.insecure_channel(server.address, options=options) as channel:
            call = DataPlaneServiceStub(channel).Attach()
            await attach(call, credit=0)
            works = [pb.Work(work_id=number, pool=pb.Pool(token_ids=[1], method="mean")) for number in range(NUM_WORKS)]
            await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=works)))
            await until(lambda: thread.load().num_computed_tokens == NUM_WORKS and not server.num_works)
            await call.write(pb.AttachRequest(credit=pb.Credit(step_batches=2 * NUM_WORKS)))
            told: list[tuple[int, int]] = []
            while len(told) < NUM_WORKS:
                batch = (await call.read()).step_batch
                told += [(delta.work_id, len(delta.pooled)) for delta in batch.deltas]
            assert told == [(number, len(WIDE)) for number in range(NUM_WORKS)]
    finally:
        await server.stop()
        thread.close()
        assert await asyncio.to_thread(thread.join, 5.0)
