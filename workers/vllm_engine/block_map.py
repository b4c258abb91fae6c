"""What vLLM says of its cache, in the names of ours: its events in, `KvEvent`s out.

vLLM names blocks by hashes of its own, which routers cannot compute. Its events carry the tokens of each stored block,
its parent and, for a first block, the salt; from these the chained keyed hash of `workers.prefix` follows. The same
block may be stored more than once (two requests computed it at the same time) and is gone with its last copy. Pure.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from workers.prefix import PrefixHasher
from workers.types import KvEvent, KvEventKind

_CLEARED = KvEvent(KvEventKind.CLEARED)


class BlockMap:
    """`hasher` has the block size of vLLM's cache."""

    def __init__(self, hasher: PrefixHasher) -> None:
        self._hasher = hasher
        self._ours: dict[Hashable, bytes] = {}
        """By vLLM's hash."""
        self._copies: dict[bytes, int] = {}
        """How many copies vLLM has of each of our blocks."""
        self.num_removed = 0
        """Different blocks that could be found and then could not, one by one."""

    @property
    def num_blocks(self) -> int:
        """Different blocks that can be found."""
        return len(self._copies)

    def stored(
        self, hashes: Sequence[Hashable], parent: Hashable | None, tokens: Sequence[int], salt: bytes
    ) -> list[KvEvent]:
        """Blocks were stored, each full of the next of `tokens`, the first after `parent` (None: at the beginning of a
        prompt with this `salt`). What follows a block that is not known cannot be named and is left out."""
        before = self._hasher.root(salt) if parent is None else self._ours.get(parent)
        if before is None or len(tokens) != self._hasher.block_size * len(hashes):
            return []
        events = []
        for theirs, ours in zip(hashes, self._hasher.blocks(before, tokens), strict=True):
            self._ours[theirs] = ours
            copies = self._copies.get(ours, 0)
            self._copies[ours] = copies + 1
            if not copies:
                events.append(KvEvent(KvEventKind.STORED, ours))
        return events

    def removed(self, hashes: Iterable[Hashable]) -> list[KvEvent]:
        """A copy of each of these is gone."""
        events = []
        for theirs in hashes:
            ours = self._ours.get(theirs)
            copies = self._copies.get(ours, 0) if ours is not None else 0
            if ours is None or not copies:
                continue
            if copies > 1:
                self._copies[ours] = copies - 1
                continue
            # Its children are found through it alone, in vLLM's cache as in ours, and keep their names.
            del self._copies[ours], self._ours[theirs]
            self.num_removed += 1
            events.append(KvEvent(KvEventKind.REMOVED, ours))
        return events

    def cleared(self) -> list[KvEvent]:
        """Nothing is in the cache, or nothing is known of it any more."""
        self._ours.clear()
        self._copies.clear()
        return [_CLEARED]

    def anew(self) -> list[KvEvent]:
        """Return events that tell of all from the beginning."""
        return [_CLEARED, *(KvEvent(KvEventKind.STORED, ours) for ours in self._copies)]
