"""The router's end of a stream: who is refused, what silence means, coming back."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceServicer, add_DataPlaneServiceServicer_to_server
from octavo.names import Reason

from router.hello import RouterIdentity
from router.link import LinkTimes, ReplicaLink
from router.types import ReplicaAddress
from tests.data_plane.rig import FAST, KEYS, ROUTER, RecordingSink, Replica, make_dispatcher, make_request, until
from workers.errors import UnavailableError
from workers.handshake import MIN_PROTOCOL, PROTOCOL, ClusterKeys
from workers.prefix import PrefixHasher

OTHER_KEYS = ClusterKeys.derive(bytes(32))


class Listener:
    """Remembers what a link says."""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self.num_changes = 0
        self.is_over = False

    def link_changed(self, link: ReplicaLink) -> None:
        self.num_changes += 1

    def link_delivered(self, link: ReplicaLink, batch: pb.StepBatch) -> None:
        raise AssertionError("nothing was sent")

    def link_lost(self, link: ReplicaLink, detail: str) -> None:
        self.lost.append(detail)

    def link_over(self, link: ReplicaLink) -> None:
        self.is_over = True


@asynccontextmanager
async def link_to(
    address: ReplicaAddress, *, identity: RouterIdentity = ROUTER, times: LinkTimes = FAST
) -> AsyncIterator[tuple[ReplicaLink, Listener]]:
    listener = Listener()
    link = ReplicaLink(address, identity, listener, rng=random.Random(1), times=times)
    link.start()
    try:
        yield link, listener
    finally:
        await link.close()
        assert listener.is_over


class Impostor(DataPlaneServiceServicer):
    """A peer that follows a script of responses and then waits, or ends the stream."""

    def __init__(self, *responses: pb.AttachResponse, ends: bool = False) -> None:
        self.responses = responses
        self.ends = ends
        self.heard: list[pb.AttachRequest] = []
        self.attached_at: list[float] = []

    async def Attach(self, request_iterator: Any, context: Any) -> None:  # type: ignore[override]  # noqa: N802
        self.attached_at.append(time.monotonic())
        for response in self.responses:
            await context.write(response)
        while not self.ends and (message := await context.read()) is not grpc.aio.EOF:
            self.heard.append(message)


@asynccontextmanager
async def impostor(peer: Impostor) -> AsyncIterator[ReplicaAddress]:
    server = grpc.aio.server()
    add_DataPlaneServiceServicer_to_server(peer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield ReplicaAddress(replica_id="one", address=f"127.0.0.1:{port}")
    finally:
        await server.stop(None)


def challenge(**changes: Any) -> pb.AttachResponse:
    fields = {"nonce": bytes(32), "replica_id": "one", "min_protocol": PROTOCOL, "max_protocol": PROTOCOL}
    return pb.AttachResponse(challenge=pb.Challenge(**(fields | changes)))


def hello_ack(**changes: Any) -> pb.AttachResponse:
    fingerprint = PrefixHasher(KEYS.prefix_hash, 4).key_fingerprint
    fields = {
        "replica_id": "one",
        "block_size": 4,
        "num_blocks": 8,
        "fingerprints": pb.Fingerprints(hash_key=fingerprint),
        "load": pb.Load(credit_tokens=100),
    }
    return pb.AttachResponse(hello_ack=pb.HelloAck(**(fields | changes)))


async def test_a_good_replica_is_ready_and_known() -> None:
    replica = await Replica("one").start()
    async with link_to(replica.address) as (link, listener):
        await until(lambda: link.can_send)
        view = link.view()
        assert (view.state, view.detail, view.model, view.engine) == ("ready", "", "fake", "fake")
        assert (view.address, view.node_id, view.block_size) == (replica.server.address, "node-1", 4)
        assert view.epoch == replica.server.epoch
        assert view.pid > 0
        assert view.load.num_free_blocks == 256
        assert listener.lost == []
    await replica.stop()


@pytest.mark.parametrize(
    ("identity", "text"),
    [
        (replace(ROUTER, keys=OTHER_KEYS), Reason.BAD_PROOF),
        (replace(ROUTER, model_fingerprint="other"), "expects model 'other'"),
        (replace(ROUTER, tokenizer_fingerprint="other"), "expects tokenizer 'other'"),
        (replace(ROUTER, keys=replace(KEYS, prefix_hash=b"other")), "the replica hashes blocks with key"),
    ],
)
async def test_a_replica_that_does_not_fit_is_shown_as_refused_with_the_reason(
    identity: RouterIdentity, text: str
) -> None:
    replica = await Replica("one").start()
    async with link_to(replica.address, identity=identity) as (link, listener):
        await until(lambda: link.view().state == "refused")
        assert text in link.view().detail
        assert not link.can_send
        assert listener.lost == []
    await replica.stop()


@pytest.mark.parametrize(
    ("script", "text"),
    [
        ([challenge(replica_id="two")], "is replica 'two', not 'one'"),
        ([challenge(min_protocol=8, max_protocol=9)], "speaks protocols 8 to 9 only"),
        ([challenge(), hello_ack(block_size=0)], "block_size must be at least 1"),
        ([challenge(), hello_ack(resident=pb.KvEvents(stored=b"short"))], "16 bytes each"),
        ([challenge(), hello_ack(fingerprints=pb.Fingerprints())], "the replica hashes blocks with key ''"),
    ],
)
async def test_a_peer_that_is_no_replica_of_ours_is_refused(script: list[pb.AttachResponse], text: str) -> None:
    async with impostor(Impostor(*script)) as address, link_to(address) as (link, _):
        await until(lambda: link.view().state == "refused")
        assert text in link.view().detail


async def test_who_is_not_the_replica_gets_no_proof_that_it_could_use() -> None:
    peer = Impostor(challenge(replica_id="two"))
    async with impostor(peer) as address, link_to(address) as (link, _):
        await until(lambda: link.view().state == "refused")
    assert peer.heard == []


async def test_a_peer_that_hangs_up_during_the_handshake_is_tried_again() -> None:
    async with impostor(Impostor(challenge(), ends=True)) as address, link_to(address) as (link, listener):
        await until(lambda: "ended the stream during the handshake" in link.view().detail)
        assert listener.lost == []


async def test_a_port_that_nobody_has_is_tried_again_until_somebody_does() -> None:
    replica = Replica("one")
    await replica.start()
    address = replica.address
    await replica.stop()
    async with link_to(address) as (link, _):
        await until(lambda: bool(link.view().detail))
        assert link.view().state == "connecting"
        again = Replica("one")
        again.server._port = int(address.address.rpartition(":")[2])
        await again.start()
        await until(lambda: link.can_send)
        await again.stop()


async def test_a_peer_that_never_answers_costs_so_long_and_no_longer() -> None:
    times = replace(FAST, attach_s=0.05)
    async with impostor(Impostor()) as address, link_to(address, times=times) as (link, _):
        await until(lambda: "no answer" in link.view().detail)
        assert link.view().state == "connecting"


async def test_a_silent_replica_is_lost() -> None:
    """It shook hands and then froze, as after a SIGSTOP; its connection stays."""
    times = replace(FAST, silence_s=0.2)
    async with impostor(Impostor(challenge(), hello_ack())) as address:
        dispatcher = make_dispatcher(times=times)
        dispatcher.start()
        dispatcher.update_replicas([address])
        sink = RecordingSink()
        dispatcher.submit(make_request(range(10)), sink)
        await until(lambda: len(sink.decisions) == 3)
        await sink.wait()
        assert isinstance(sink.error, UnavailableError)
        assert sink.error.reason == Reason.REPLICA_LOST
        assert "nothing was heard of the replica for 0.2 s" in str(sink.error)
        dispatcher.check_integrity()
        await dispatcher.stop()


async def test_a_malformed_message_ends_the_stream_and_the_requests_on_it() -> None:
    bad = pb.AttachResponse(step_batch=pb.StepBatch(kv_events=pb.KvEvents(stored=b"short")))
    async with impostor(Impostor(challenge(), hello_ack(), bad)) as address, link_to(address) as (_, listener):
        await until(lambda: bool(listener.lost))
        assert "16 bytes each" in listener.lost[0]


@pytest.mark.parametrize("is_late", [False, True])
async def test_what_says_nonsense_each_time_is_attached_ever_less_often(is_late: bool) -> None:
    """It had the secret and fitted, so each attachment counted as a success, and the next one followed at once."""
    bad = pb.AttachResponse(step_batch=pb.StepBatch(kv_events=pb.KvEvents(stored=b"short")))
    ack = hello_ack() if is_late else hello_ack(resident=pb.KvEvents(stored=b"short"))
    times, peer = replace(FAST, min_backoff_s=0.01, max_backoff_s=60.0), Impostor(challenge(), ack, bad)
    async with impostor(peer) as address, link_to(address, times=times):
        await until(lambda: len(peer.attached_at) >= 6)
    waits = [later - sooner for sooner, later in itertools.pairwise(peer.attached_at)]
    for number, wait in enumerate(waits, start=1):
        assert wait >= 0.5 * 0.01 * 2**number


async def test_a_replica_of_the_version_before_is_spoken_to_in_its_own() -> None:
    """A rolling update: such a replica sends no columns, and is not asked for any."""
    peer = Impostor(challenge(min_protocol=MIN_PROTOCOL, max_protocol=MIN_PROTOCOL), hello_ack())
    async with impostor(peer) as address, link_to(address) as (link, _):
        await until(lambda: link.can_send and bool(peer.heard))
        assert [message.hello.protocol for message in peer.heard] == [MIN_PROTOCOL]
    assert MIN_PROTOCOL < PROTOCOL


async def test_what_the_listener_raises_costs_the_stream_and_not_the_link(caplog: pytest.LogCaptureFixture) -> None:
    delta = pb.AttachResponse(step_batch=pb.StepBatch(deltas=[pb.WorkDelta(work_id=1)]))
    async with impostor(Impostor(challenge(), hello_ack(), delta)) as address, link_to(address) as (_, listener):
        await until(lambda: len(listener.lost) >= 2)
        assert "nothing was sent" in caplog.text


async def test_a_heartbeat_is_enough_to_be_alive() -> None:
    replica = await Replica("one").start()
    async with link_to(replica.address, times=replace(FAST, silence_s=1.2)) as (link, listener):
        await until(lambda: link.can_send)
        await asyncio.sleep(2.0)
        assert link.can_send
        assert listener.lost == []
        assert listener.num_changes >= 6
    await replica.stop()
