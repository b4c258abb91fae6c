"""Block hashes: chained, keyed, parted by salt and adapter, and the same on every machine."""

from __future__ import annotations

import pytest

from workers.prefix import HASH_BYTES, PrefixHasher

HASHER = PrefixHasher(b"key", 4)


def test_the_hashes_of_a_prefix_are_chained() -> None:
    root = HASHER.root()
    first, second = HASHER.blocks(root, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert first == HASHER.block(root, [1, 2, 3, 4])
    assert second == HASHER.block(first, [5, 6, 7, 8])
    assert len(first) == HASH_BYTES
    assert HASHER.blocks(first, [5, 6, 7, 8]) == [second]
    assert HASHER.blocks(root, [1, 2, 3]) == []
    assert HASHER.blocks(root, []) == []


def test_an_early_token_changes_all_that_follow() -> None:
    one, other = (HASHER.blocks(HASHER.root(), [first, *range(11)]) for first in (1, 2))
    assert len({*one, *other}) == 6


def test_tokens_are_hashed_as_four_bytes_whatever_they_are() -> None:
    """Not as text: [1, 23] and [12, 3] part; nor does any list type matter."""
    hasher = PrefixHasher(b"key", 2)
    root = hasher.root()
    assert hasher.block(root, [1, 23]) != hasher.block(root, [12, 3])
    assert hasher.block(root, (0, 2**32 - 1)) == hasher.block(root, [0, 2**32 - 1])
    with pytest.raises(OverflowError):
        hasher.block(root, [0, 2**32])


def test_roots_part_salts_adapters_and_their_pairs() -> None:
    roots = [HASHER.root(*pair) for pair in [(b"", ""), (b"a", ""), (b"", "a"), (b"a", "b"), (b"ab", ""), (b"", "ab")]]
    assert len(set(roots)) == 6
    assert HASHER.root(b"a", "b") == HASHER.root(b"a", "b")


def test_another_key_or_block_size_names_nothing_alike() -> None:
    others = [PrefixHasher(b"", 4), PrefixHasher(b"k", 4), PrefixHasher(b"key", 2)]
    fingerprints = {hasher.key_fingerprint for hasher in [HASHER, *others]}
    assert len(fingerprints) == 4
    names = [hasher.blocks(hasher.root(), range(8)) for hasher in [HASHER, *others]]
    assert len({name for found in names for name in found}) == 2 + 2 + 2 + 4
    assert PrefixHasher(b"key", 4).key_fingerprint == HASHER.key_fingerprint


def test_the_hash_is_fixed() -> None:
    """Routers and replicas of neighbouring versions compare hashes: a change here is a change of the protocol."""
    assert HASHER.root(b"salt", "adapter").hex() == "3ccbc1cafb0abea4d78bf28983d62181"
    assert HASHER.block(HASHER.root(), [1, 2, 3, 70_000]).hex() == "036f7864376d832a250b9b8ff6f9fe0c"


@pytest.mark.parametrize(("key", "block_size"), [(b"", 0), (b"x" * 65, 4)])
def test_what_it_cannot_be_made_of(key: bytes, block_size: int) -> None:
    with pytest.raises(AssertionError):
        PrefixHasher(key, block_size)


def test_a_block_is_full() -> None:
    with pytest.raises(AssertionError):
        HASHER.block(HASHER.root(), [1, 2, 3])
