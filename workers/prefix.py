"""Names for full KV blocks: a chained keyed hash, the same in the engine and in the router.

``h[0] = H(root + tokens of block 0)``, ``h[i] = H(h[i-1] + tokens of block i)`` with keyed BLAKE2b, 16 bytes, and
``root = H(salt, adapter)``. The key comes from the cluster's secret and the salt from the authenticated tenant, so that
nobody outside can make two prefixes collide or ask for another tenant's blocks. Knows no blocks and no cache.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

HASH_BYTES = 16
DIGEST_MASK = (1 << 64) - 1


def toggle(digest: int, block_hash: bytes) -> int:
    """Return the digest of a set of hashes after this one has joined or left it; that of the empty set is 0.

    It does not depend on the order. What crosses the data plane is ``digest & DIGEST_MASK``."""
    return digest ^ int.from_bytes(block_hash, "little")


class PrefixHasher:
    """Hashes blocks of `block_size` tokens under `key` (at most 64 bytes)."""

    __slots__ = ("_empty", "_key", "block_size")

    def __init__(self, key: bytes, block_size: int) -> None:
        assert block_size >= 1
        assert len(key) <= 64
        self._key = key
        self._empty = hashlib.blake2b(key=key, digest_size=HASH_BYTES, person=b"octavo block")
        """A copy of it costs a quarter less than a new one."""
        self.block_size = block_size

    @property
    def key_fingerprint(self) -> str:
        """Tells whether two parties hold the same key and block size, without telling the key."""
        return hashlib.blake2b(
            b"octavo hash key fingerprint %d" % self.block_size, key=self._key, digest_size=8
        ).hexdigest()

    def root(self, salt: bytes = b"", adapter: str = "") -> bytes:
        """Return the parent of a first block. Lengths are hashed too, so (salt, adapter) pairs never run together."""
        name = adapter.encode()
        text = len(salt).to_bytes(4, "little") + salt + len(name).to_bytes(4, "little") + name
        return hashlib.blake2b(text, key=self._key, digest_size=HASH_BYTES, person=b"octavo root").digest()

    def block(self, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Return the hash of a full block of `tokens` that follows `parent`."""
        assert len(tokens) == self.block_size
        return self._digest(parent + _little_endian(tokens))

    def blocks(self, parent: bytes, tokens: Sequence[int]) -> list[bytes]:
        """Return the chained hashes of all full blocks at the beginning of `tokens`, the first following `parent`."""
        size, copy = 4 * self.block_size, self._empty.copy
        data = _little_endian(tokens)
        hashes = []
        for start in range(0, len(data) // size * size, size):
            hasher = copy()
            hasher.update(parent + data[start : start + size])
            parent = hasher.digest()
            hashes.append(parent)
        return hashes

    def _digest(self, data: bytes) -> bytes:
        hasher = self._empty.copy()
        hasher.update(data)
        return hasher.digest()


def _little_endian(tokens: Sequence[int]) -> bytes:
    words = array("I", tokens)
    assert words.itemsize == 4
    if sys.byteorder == "big":  # pragma: no cover
        words.byteswap()
    return words.tobytes()
