"""TLS on the data port: routers of the cluster get in, nobody else gets as far as the protocol."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub

from router.hello import RouterIdentity
from tests.data_plane.rig import (
    KEYS,
    ROUTER,
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    make_dispatcher,
    make_request,
    ready_cluster,
    until,
)
from workers.handshake import ClusterKeys
from workers.peer_tls import CHANNEL_OPTION, channel_credentials, peer_certificate

OTHER_KEYS = ClusterKeys.derive(bytes(32))


@asynccontextmanager
async def encrypted_replica() -> AsyncIterator[Replica]:
    replica = await Replica("one", is_encrypted=True).start()
    try:
        yield replica
    finally:
        await replica.stop()


async def test_a_router_of_the_cluster_uses_an_encrypted_replica() -> None:
    replica = Replica("one", is_encrypted=True)
    async with ready_cluster(replica) as dispatcher:
        request, sink = make_request([1, 2, 3, 4, 5]), RecordingSink()
        dispatcher.submit(request, sink)
        await sink.wait()
        assert_answers(sink, request)
        await assert_idle(dispatcher, replica)


async def test_each_end_has_a_key_of_its_own() -> None:
    one, two = (peer_certificate(KEYS.data_plane_tls) for _ in range(2))
    assert one.key != two.key
    assert repr(one.key) not in repr(one)


@pytest.mark.parametrize(
    "credentials",
    [
        channel_credentials(OTHER_KEYS.data_plane_tls),
        grpc.ssl_channel_credentials(peer_certificate(KEYS.data_plane_tls).authority),
        None,
    ],
    ids=["of another cluster", "without a certificate", "in clear"],
)
async def test_a_stranger_who_dials_the_data_port_learns_nothing(credentials: grpc.ChannelCredentials | None) -> None:
    async with encrypted_replica() as replica:
        options = [CHANNEL_OPTION, ("grpc.use_local_subchannel_pool", 1)]
        channel = (
            grpc.aio.secure_channel(replica.server.address, credentials, options)
            if credentials
            else grpc.aio.insecure_channel(replica.server.address, options)
        )
        async with channel:
            call = DataPlaneServiceStub(channel).Attach()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert replica.server.num_routers == 0


@pytest.mark.parametrize(
    ("identity", "is_encrypted"),
    [
        (replace(ROUTER, keys=OTHER_KEYS), True),
        (replace(ROUTER, keys=replace(KEYS, data_plane=b"other" * 8)), True),
        (ROUTER, False),
    ],
    ids=["another secret", "a certificate without the proof", "in clear"],
)
async def test_a_router_that_does_not_belong_gets_no_replica(identity: RouterIdentity, is_encrypted: bool) -> None:
    async with encrypted_replica() as replica:
        dispatcher = make_dispatcher(identity=identity)
        dispatcher.start()
        try:
            dispatcher.update_replicas([replace(replica.address, is_encrypted=is_encrypted)])
            await until(lambda: any(view.detail for view in dispatcher.replicas()))
            assert all(view.state != "ready" for view in dispatcher.replicas())
        finally:
            await dispatcher.stop()
