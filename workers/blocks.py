"""The pool of KV blocks: who holds which block, what is in it, and which one is given away next.

Owns reference counts, the free list and the map from block hash to block. Knows block numbers and hashes, not tokens,
sequences or memory: the keys and values themselves belong to the runner.

    free ──allocate──► pending(filler) ──fill──► ready ──release──► free (content and hash kept until reused)
      ▲                      │                     ▲                        │
      └──────release─────────┘                     └────────acquire─────────┘

A block is pending while somebody fills it: a step, another sequence, a copy from elsewhere; whoever it is promises the
hash beforehand, so that others can wait for the block instead of filling a second one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from functools import reduce

from workers.prefix import DIGEST_MASK, toggle
from workers.types import KvEvent, KvEventKind, Resident


class Block:
    """One block's entry. Free: no references. Pending: it has a filler. Ready: neither."""

    __slots__ = ("filler", "hash", "references")

    def __init__(self) -> None:
        self.references = 0
        self.hash: bytes | None = None
        """Of a pending block: promised. Of a ready or free one: findable under it. None: nobody can find it."""
        self.filler: Hashable | None = None


class BlockPool:
    """Hands out `num_blocks` blocks, numbered from 0. Not thread safe."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 1
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        """The next one to be reused first: blocks without a hash, then by the time of their release."""
        self._resident: dict[bytes, int] = {}
        self._digest = 0
        """Of the hashes in `_resident`."""
        self._promised: dict[bytes, int] = {}
        self._events: list[KvEvent] = []
        self.num_cached = 0
        """Free blocks whose content can be found."""
        self.num_evictions = 0
        """How often content that could be found made way for other content."""

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_references(self, block: int) -> int:
        return self._blocks[block].references

    def is_pending(self, block: int) -> bool:
        return self._blocks[block].filler is not None

    def is_resident(self, block_hash: bytes) -> bool:
        return block_hash in self._resident

    def is_promised(self, block_hash: bytes) -> bool:
        """Whether somebody is filling a block that will have this hash."""
        return block_hash in self._promised

    def filler_of(self, block_hash: bytes) -> Hashable | None:
        """Return who is filling the block that will have this hash."""
        block = self._promised.get(block_hash)
        return None if block is None else self._blocks[block].filler

    def resident_hashes(self) -> frozenset[bytes]:
        """Return the hashes under which blocks can be found now."""
        return frozenset(self._resident)

    def resident(self) -> Resident:
        """Return how many hashes that are, and their digest."""
        return Resident(len(self._resident), self._digest & DIGEST_MASK)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """Return the blocks of the longest leading part of `hashes` that is resident. `acquire` them before use."""
        blocks = []
        for block_hash in hashes:
            block = self._resident.get(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Add a reference to each of these blocks, which are in use or resident."""
        for number in blocks:
            block = self._blocks[number]
            assert block.references or block.hash is not None
            if block.references == 0:
                del self._free[number]
                self.num_cached -= 1
            block.references += 1

    def allocate(self, count: int, filler: Hashable) -> list[int] | None:
        """Take `count` blocks to be filled by `filler`, forgetting what was in them; None, and no effect, if there are
        too few. The caller ends with `fill` and `release`, or with `release` alone."""
        assert filler is not None
        if count > len(self._free):
            return None
        return [self._take(filler) for _ in range(count)]

    def promise(self, block: int, block_hash: bytes) -> None:
        """Say what a pending block will hold. Has no effect if that is resident or promised already."""
        entry = self._blocks[block]
        assert entry.filler is not None
        assert entry.hash is None
        if block_hash not in self._resident and block_hash not in self._promised:
            entry.hash = block_hash
            self._promised[block_hash] = block

    def fill(self, block: int, block_hash: bytes | None = None) -> None:
        """Make a pending block ready, findable under `block_hash` unless another block already is."""
        entry = self._blocks[block]
        assert entry.filler is not None
        self._break_promise(entry)
        entry.filler = None
        if block_hash is not None and block_hash not in self._resident:
            entry.hash = block_hash
            self._resident[block_hash] = block
            self._digest = toggle(self._digest, block_hash)
            self._events.append(KvEvent(KvEventKind.STORED, block_hash))

    def write(self, block: int, filler: Hashable) -> int | None:
        """Return the block into which the holder of one reference to `block` may write instead: itself if nobody else
        can see it, otherwise a new one (copy on write), or None if there is no block for that.

        If it is a new one, the caller copies the content before it writes, and releases `block` after the copy.
        """
        entry = self._blocks[block]
        assert entry.references
        is_alone = entry.references == 1
        if is_alone and (entry.filler is not None or entry.hash is None):
            entry.filler = filler
            return block
        if self._free:
            return self._take(filler)
        if not is_alone:
            return None
        self._forget(entry)
        entry.filler = filler
        return block

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each of `blocks`: the only place where blocks become free.

        Those given first are reused first, so a sequence gives its table from the tail. Content that nobody can find,
        half-filled blocks among it, is reused before all other.
        """
        for number in blocks:
            block = self._blocks[number]
            assert block.references, f"block {number} is released more often than acquired"
            block.references -= 1
            if block.references:
                continue
            if block.filler is not None:
                self._break_promise(block)
                block.filler = None
            self._free[number] = None
            if block.hash is None:
                self._free.move_to_end(number, last=False)
            else:
                self.num_cached += 1

    def drain_events(self) -> list[KvEvent]:
        """Return the events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def events_anew(self) -> list[KvEvent]:
        """Return the events by which a reader that knows anything or nothing knows the resident set, and drop those
        that were not drained."""
        self._events = []
        return [KvEvent(KvEventKind.CLEARED), *(KvEvent(KvEventKind.STORED, name) for name in self._resident)]

    def check_integrity(self, tables: Iterable[Sequence[int]] | None = None) -> None:
        """Recompute every invariant and assert it; with the block tables of all holders, the reference counts too."""
        resident: dict[bytes, int] = {}
        promised: dict[bytes, int] = {}
        for number, block in enumerate(self._blocks):
            is_free = number in self._free
            assert is_free == (block.references == 0), (
                f"block {number}: free list against {block.references} references"
            )
            assert not (is_free and block.filler is not None), f"block {number} is free and pending"
            if block.hash is not None:
                names = resident if block.filler is None else promised
                assert block.hash not in names, f"two blocks under hash {block.hash.hex()}"
                names[block.hash] = number
        assert resident == self._resident
        assert reduce(toggle, resident, 0) == self._digest
        assert promised == self._promised
        assert len(self._free) + sum(block.references > 0 for block in self._blocks) == self.num_blocks
        has_hash = [self._blocks[number].hash is not None for number in self._free]
        assert has_hash == sorted(has_hash), "a block with content stands before one without in the free list"
        assert self.num_cached == sum(has_hash)
        if tables is not None:
            counted = [0] * self.num_blocks
            for table in tables:
                for number in table:
                    counted[number] += 1
            assert counted == [block.references for block in self._blocks]

    def _take(self, filler: Hashable) -> int:
        number, _ = self._free.popitem(last=False)
        block = self._blocks[number]
        if block.hash is not None:
            self.num_cached -= 1
            self._forget(block)
        block.references = 1
        block.filler = filler
        return number

    def _forget(self, block: Block) -> None:
        """Make a block that can be found, and is not pending, unfindable."""
        assert block.hash is not None
        del self._resident[block.hash]
        self._digest = toggle(self._digest, block.hash)
        self._events.append(KvEvent(KvEventKind.REMOVED, block.hash))
        self.num_evictions += 1
        block.hash = None

    def _break_promise(self, block: Block) -> None:
        if block.hash is not None:
            del self._promised[block.hash]
            block.hash = None
