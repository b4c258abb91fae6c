"""The router's half of the handshake on a data port: prove the cluster's secret, accept only a replica that fits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import grpc
import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb

from workers.handshake import NONCE_BYTES, ClusterKeys, choose_protocol, prove
from workers.peer_tls import channel_credentials
from workers.prefix import PrefixHasher

MAX_ACK_BYTES: Final = 65_536
"""Of a HelloAck without the blocks that are resident: a router keeps it and tells of it."""


@dataclass(frozen=True, kw_only=True)
class RouterIdentity:
    """Who this router is, and what it expects of a replica; an empty fingerprint expects nothing."""

    router_id: str
    epoch: int
    """Grows with each start of this router."""
    keys: ClusterKeys
    model_fingerprint: str = ""
    tokenizer_fingerprint: str = ""

    @cached_property
    def credentials(self) -> grpc.ChannelCredentials:
        """What this router shows replicas whose ports speak TLS."""
        return channel_credentials(self.keys.data_plane_tls)


class MismatchError(Exception):
    """This is not a replica that we can use."""


async def shake_hands(call: Any, me: RouterIdentity, replica_id: str, *, credit: int) -> pb.HelloAck:
    """Return what the replica at the other end of `call` says of itself; it may then send `credit` StepBatches.

    Raises MismatchError if it is another replica, speaks no version of ours or hashes blocks with another key, and
    AioRpcError with the replica's reason if it refuses. Who is not `replica_id` is shown no proof.
    """
    challenge = (await _read(call)).challenge
    if challenge.replica_id != replica_id:
        raise MismatchError(f"the peer is replica {challenge.replica_id!r}, not {replica_id!r}")
    if len(challenge.nonce) != NONCE_BYTES:
        # With one of its own length a peer could have the proof for another replica made, whose id ends like ours.
        raise MismatchError(f"a nonce must have {NONCE_BYTES} bytes, has {len(challenge.nonce)}")
    protocol = choose_protocol(challenge.min_protocol, challenge.max_protocol)
    if protocol is None:
        spoken = f"{challenge.min_protocol} to {challenge.max_protocol}"
        raise MismatchError(f"the replica speaks protocols {spoken} only")
    proof = prove(
        me.keys.data_plane,
        nonce=challenge.nonce,
        replica_id=replica_id,
        router_id=me.router_id,
        router_epoch=me.epoch,
    )
    hello = pb.Hello(
        protocol=protocol,
        router_id=me.router_id,
        router_epoch=me.epoch,
        proof=proof,
        fingerprints=pb.Fingerprints(model=me.model_fingerprint, tokenizer=me.tokenizer_fingerprint),
    )
    await call.write(pb.AttachRequest(hello=hello, credit=pb.Credit(step_batches=credit)))
    ack = (await _read(call)).hello_ack
    if (size := ack.ByteSize() - ack.resident.ByteSize()) > MAX_ACK_BYTES:
        raise MismatchError(f"a replica must tell of itself in {MAX_ACK_BYTES} bytes at most, needs {size}")
    if ack.block_size < 1:
        raise MismatchError(f"block_size must be at least 1, is {ack.block_size}")
    # Only now is the block size known, which the fingerprint of the hash key covers.
    ours, theirs = PrefixHasher(me.keys.prefix_hash, ack.block_size).key_fingerprint, ack.fingerprints.hash_key
    if theirs != ours:
        raise MismatchError(f"the replica hashes blocks with key {theirs!r}, this router with {ours!r}")
    return ack


async def _read(call: Any) -> pb.AttachResponse:
    message = await call.read()
    if message is grpc.aio.EOF:
        raise MismatchError("the peer ended the stream during the handshake")
    if not isinstance(message, pb.AttachResponse):  # gRPC's None for bytes that are none
        raise MismatchError("the peer sent what is no message of the data plane")
    return message
