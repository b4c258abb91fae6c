"""Which replica has which blocks of keys and values, over all replicas: what they reported, and what is on its way.

    resident    hash -> replicas whose KV events say so; follows their reports and nothing else
    expected    hash -> replicas to which a prompt with this block was sent that is not computed yet: a lease

A set of replicas is an int with a bit for each slot, so that a match over a thousand replicas costs a few operations a
block. Exact up to `max_entries` pairs of block and replica (about 100 bytes each); beyond it the replica that has most
loses those that were stored or used longest ago. That costs a cache hit at most: what a replica has and what the
router remembers of it are told apart in `told`. Pure; knows no tokens and no loads.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, KeysView, Sequence
from itertools import islice
from typing import Final, NamedTuple

from workers.prefix import DIGEST_MASK, toggle
from workers.types import Resident

MAX_ENTRIES: Final = 2_000_000
_EVICTED_SHARE: Final = 16
"""One part in so many of the largest replica's entries goes at once, so that the search for it is rare."""


class Matches(NamedTuple):
    """Who has how much of a prompt's beginning."""

    runs: list[tuple[int, int]]
    """(blocks, slots that have so many of them, resident), disjoint, without those in `shared`."""
    shared: dict[int, tuple[int, int]]
    """By slot: blocks that it has or is about to compute, and how many of them it has. Those it computes anyway."""


def slots_of(mask: int) -> Iterator[int]:
    """Yield the slots of a set, in order."""
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def count_matched(hashes: Sequence[bytes], resident: Collection[bytes]) -> int:
    """Return how many leading `hashes` are resident."""
    for count, block_hash in enumerate(hashes):
        if block_hash not in resident:
            return count
    return len(hashes)


class _Replica:
    __slots__ = ("blocks", "digest", "num_told")

    def __init__(self) -> None:
        self.blocks: dict[bytes, None] = {}
        """What is remembered; what is forgotten first comes first."""
        self.num_told = 0
        self.digest = 0


class PrefixIndex:
    """Replicas are slots: small numbers that their owner gives, and may give again after `clear`."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        assert max_entries >= 1
        self._max_entries = max_entries
        self.num_entries = 0
        self._holders: dict[bytes, int] = {}
        self._names: dict[bytes, bytes] = {}
        """The one object for each hash in `_holders`, which all replicas' books share."""
        self._replicas: dict[int, _Replica] = {}
        self._expected: dict[bytes, int] = {}
        self._repeated: dict[tuple[int, bytes], int] = {}
        """How many times more than once a block is expected of a slot."""

    def resident(self, slot: int) -> KeysView[bytes]:
        """Return the blocks of a replica that are remembered."""
        return self._replicas[slot].blocks.keys() if slot in self._replicas else _NOTHING

    def told(self, slot: int) -> Resident:
        """Return what the replica has by its reports, also of what is no longer remembered."""
        replica = self._replicas.get(slot)
        return Resident(0, 0) if replica is None else Resident(replica.num_told, replica.digest & DIGEST_MASK)

    def num_told(self, slot: int) -> int:
        """Return how many blocks the replica has by its reports."""
        replica = self._replicas.get(slot)
        return 0 if replica is None else replica.num_told

    def store(self, slot: int, hashes: Iterable[bytes]) -> None:
        """The replica has these blocks now, those of a prompt in their order."""
        replica = self._replicas.get(slot)
        if replica is None:
            replica = self._replicas[slot] = _Replica()
        bit, blocks, holders, names = 1 << slot, replica.blocks, self._holders, self._names
        before, mask = len(blocks), 0
        # Backwards: of one prompt the tail is forgotten first, as without its head it would match nothing.
        for block_hash in reversed(list(hashes)):
            if block_hash in blocks:
                continue
            name = names.setdefault(block_hash, block_hash)
            blocks[name] = None
            # The blocks of one prompt mostly have the same holders, and then share the one set.
            if (now := holders.get(name, 0) | bit) != mask:
                mask = now
            holders[name] = mask
            replica.num_told += 1
            replica.digest = toggle(replica.digest, name)
        self.num_entries += len(blocks) - before
        while self.num_entries > self._max_entries:
            self._evict()

    def remove(self, slot: int, hashes: Iterable[bytes]) -> None:
        """The replica no longer has these blocks; of one that it never had: no effect."""
        replica = self._replicas.get(slot)
        if replica is None:
            return
        for block_hash in hashes:
            is_known = block_hash in replica.blocks
            if is_known:
                self._forget(slot, replica, block_hash)
            if is_known or replica.num_told > len(replica.blocks):
                replica.num_told -= 1
                replica.digest = toggle(replica.digest, block_hash)

    def clear(self, slot: int) -> None:
        """The replica has nothing, or has left. Costs what it had."""
        replica = self._replicas.pop(slot, None)
        if replica is not None:
            for block_hash in list(replica.blocks):
                self._forget(slot, replica, block_hash)

    def touch(self, slot: int, hashes: Iterable[bytes]) -> None:
        """These blocks of the replica are about to be used: they are remembered longest. While there is room for as
        many entries again the order does not matter, and nothing is done."""
        if 2 * self.num_entries <= self._max_entries or (replica := self._replicas.get(slot)) is None:
            return
        blocks = replica.blocks
        for block_hash in reversed(list(hashes)):
            if block_hash in blocks:
                name = self._names[block_hash]
                del blocks[name]
                blocks[name] = None

    def expect(self, slot: int, hashes: Iterable[bytes]) -> None:
        """A prompt with these blocks is on its way to the replica. `unexpect` the same ones once."""
        bit, expected, mask = 1 << slot, self._expected, 0
        for block_hash in hashes:
            before = expected.get(block_hash, 0)
            if before & bit:
                key = (slot, block_hash)
                self._repeated[key] = self._repeated.get(key, 0) + 1
            else:
                if (now := before | bit) != mask:
                    mask = now
                expected[block_hash] = mask

    def unexpect(self, slot: int, hashes: Iterable[bytes]) -> None:
        bit, expected, repeated = 1 << slot, self._expected, self._repeated
        for block_hash in hashes:
            key = (slot, block_hash)
            if count := repeated.get(key, 0):
                if count == 1:
                    del repeated[key]
                else:
                    repeated[key] = count - 1
            elif mask := expected[block_hash] & ~bit:
                expected[block_hash] = mask
            else:
                del expected[block_hash]

    def holders(self, block_hash: bytes) -> int:
        """Return the slots of which this block is resident or expected."""
        return self._holders.get(block_hash, 0) | self._expected.get(block_hash, 0)

    def match(self, hashes: Iterable[bytes]) -> Matches:
        """Return who has a beginning of the prompt with these blocks. Asks for no more of them than anybody has, and
        one. Most blocks are where the ones before them are, and change nothing."""
        holders, expected = self._holders.get, self._expected.get
        runs: list[tuple[int, int]] = []
        shared: dict[int, tuple[int, int]] = {}
        first_missing: dict[int, int] = {}
        has_all = computes = 0
        number = last_resident = last_coming = 0
        for number, block_hash in enumerate(hashes):
            resident = holders(block_hash, 0)
            if number and resident == has_all and not computes:
                continue
            coming = expected(block_hash, 0)
            if number and resident == last_resident and coming == last_coming:
                continue
            last_resident, last_coming = resident, coming
            still = has_all & resident if number else resident
            lost = has_all & ~still if number else coming & ~still
            go_on = (lost | computes) & (resident | coming)
            if ended := lost & ~go_on:
                runs.append((number, ended))
            for slot in slots_of(computes & ~go_on):
                shared[slot] = (number, first_missing[slot])
            for slot in slots_of(go_on & ~computes):
                first_missing[slot] = number
            has_all, computes = still, go_on
            if not has_all and not computes:
                return Matches(runs, shared)
        # All of the blocks there are, if there are any, and not one of which nobody has.
        if has_all:
            runs.append((number + 1, has_all))
        for slot in slots_of(computes):
            shared[slot] = (number + 1, first_missing[slot])
        return Matches(runs, shared)

    def _forget(self, slot: int, replica: _Replica, block_hash: bytes) -> None:
        del replica.blocks[block_hash]
        self.num_entries -= 1
        if mask := self._holders[block_hash] & ~(1 << slot):
            self._holders[block_hash] = mask
        else:
            del self._holders[block_hash]
            del self._names[block_hash]

    def _evict(self) -> None:
        """Forget the oldest entries of the replica that has most."""
        slot, replica = max(self._replicas.items(), key=lambda item: len(item[1].blocks))
        for block_hash in list(islice(replica.blocks, len(replica.blocks) // _EVICTED_SHARE + 1)):
            self._forget(slot, replica, block_hash)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        holders: dict[bytes, int] = {}
        for slot, replica in self._replicas.items():
            assert len(replica.blocks) <= replica.num_told
            for block_hash in replica.blocks:
                holders[block_hash] = holders.get(block_hash, 0) | 1 << slot
                assert self._names[block_hash] is block_hash
        assert holders == self._holders
        assert holders.keys() == self._names.keys()
        assert self.num_entries == sum(len(replica.blocks) for replica in self._replicas.values()) <= self._max_entries
        assert all(self._expected.values())
        assert all(self._expected[block_hash] >> slot & 1 for slot, block_hash in self._repeated)


_NOTHING: Final = dict[bytes, None]().keys()
