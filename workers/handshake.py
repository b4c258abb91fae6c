"""Trust between router and replica: keys out of the cluster's secret, the proof of a Hello, versions of the protocol.

Both ends of the data plane import this; it needs the standard library only and owns no state. The secret and the keys
are never sent: a replica sends a fresh nonce, and the router shows that it knows the key.
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field

PROTOCOL = 2
"""What this release speaks."""
MIN_PROTOCOL = 1
"""The oldest it still understands: the version before."""
TOKENS_PROTOCOL = 2
"""From this version on a replica sends plain tokens in columns (`WorkTokens`)."""

SECRET_BYTES = 32
NONCE_BYTES = 32
KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class ClusterKeys:
    """What is derived from the cluster's secret. Its repr shows none of it."""

    data_plane: bytes = field(repr=False)
    prefix_hash: bytes = field(repr=False)
    tenant_salt: bytes = field(repr=False)
    data_plane_tls: bytes = field(repr=False)

    @classmethod
    def derive(cls, secret: bytes) -> ClusterKeys:
        """Raises ValueError unless `secret` has 32 bytes."""
        purposes = ("data-plane", "prefix-hash", "tenant-salt", "data-plane-tls")
        return cls(*(derive_key(secret, purpose) for purpose in purposes))


def derive_key(secret: bytes, purpose: str) -> bytes:
    """Return the 32-byte key for `purpose`: HKDF-SHA256 (RFC 5869) without salt, `purpose` as its info.

    Raises ValueError unless `secret` has 32 bytes.
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"the cluster's secret must have {SECRET_BYTES} bytes, has {len(secret)}")
    extracted = hmac.digest(bytes(hashlib.sha256().digest_size), secret, "sha256")
    return hmac.digest(extracted, purpose.encode() + b"\x01", "sha256")


def prove(key: bytes, *, nonce: bytes, replica_id: str, router_id: str, router_epoch: int) -> bytes:
    """Return what a Hello must carry to answer `nonce`. The replica's id is its own and the nonce has a fixed length,
    so the ids cannot run into one another."""
    text = nonce + replica_id.encode() + router_id.encode() + router_epoch.to_bytes(8, "little")
    return hmac.digest(key, text, "sha256")


def is_proven(proof: bytes, key: bytes, *, nonce: bytes, replica_id: str, router_id: str, router_epoch: int) -> bool:
    """Say whether `proof` answers `nonce`, in a time that does not depend on where it is wrong."""
    expected = prove(key, nonce=nonce, replica_id=replica_id, router_id=router_id, router_epoch=router_epoch)
    return hmac.compare_digest(proof, expected)


def choose_protocol(minimum: int, maximum: int) -> int | None:
    """Return the newest version that we and a peer with this range speak, or None."""
    version = min(maximum, PROTOCOL)
    return version if version >= max(minimum, MIN_PROTOCOL) else None
