"""Keys, proofs, versions."""

from __future__ import annotations

import hashlib
import hmac

import pytest

from workers import handshake
from workers.handshake import ClusterKeys, choose_protocol, derive_key, is_proven, prove

SECRET = bytes(range(32))
PEER = {"nonce": bytes(32), "replica_id": "one", "router_id": "router", "router_epoch": 7}


def hkdf(secret: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, section 2, written out."""
    prk = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    block, okm, counter = b"", b"", 1
    while len(okm) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha256).digest()
        okm += block
        counter += 1
    return okm[:length]


def test_the_written_out_hkdf_is_that_of_the_rfc() -> None:
    """Test case 3 of RFC 5869: no salt, no info."""
    expected = "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8"
    assert hkdf(b"\x0b" * 22, b"", 42).hex() == expected


def test_keys_are_hkdf_of_the_secret_and_differ() -> None:
    keys = ClusterKeys.derive(SECRET)
    assert keys.data_plane == hkdf(SECRET, b"data-plane", 32)
    assert keys.prefix_hash == hkdf(SECRET, b"prefix-hash", 32)
    assert keys.tenant_salt == hkdf(SECRET, b"tenant-salt", 32)
    assert keys.data_plane_tls == hkdf(SECRET, b"data-plane-tls", 32)
    assert len({keys.data_plane, keys.prefix_hash, keys.tenant_salt, keys.data_plane_tls, SECRET}) == 5
    assert repr(keys) == "ClusterKeys()"


def test_a_secret_has_32_bytes() -> None:
    with pytest.raises(ValueError, match="must have 32 bytes, has 31"):
        derive_key(SECRET[1:], "data-plane")


def test_a_proof_is_what_the_contract_says() -> None:
    text = bytes(32) + b"one" + b"router" + (7).to_bytes(8, "little")
    assert prove(b"key", **PEER) == hmac.new(b"key", text, hashlib.sha256).digest()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [{"nonce": b"\x01" + bytes(31)}, {"replica_id": "two"}, {"router_id": "other"}, {"router_epoch": 8}],
)
def test_a_proof_is_for_one_nonce_replica_router_and_epoch(changed: dict[str, object]) -> None:
    proof = prove(b"key", **PEER)  # type: ignore[arg-type]
    assert is_proven(proof, b"key", **PEER)  # type: ignore[arg-type]
    assert not is_proven(proof, b"key", **(PEER | changed))  # type: ignore[arg-type]
    assert not is_proven(proof, b"other", **PEER)  # type: ignore[arg-type]
    assert not is_proven(b"", b"key", **PEER)  # type: ignore[arg-type]


def test_neighbouring_versions_understand_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "PROTOCOL", 5)
    monkeypatch.setattr(handshake, "MIN_PROTOCOL", 4)
    assert choose_protocol(4, 5) == 5
    assert choose_protocol(5, 6) == 5
    assert choose_protocol(3, 4) == 4
    assert choose_protocol(2, 3) is None
    assert choose_protocol(6, 7) is None
