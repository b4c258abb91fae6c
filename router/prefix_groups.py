"""Which waiting requests share a beginning, so that it is computed once if they go together. Pure.

A request goes with another one if that one has at least the first half of its own full blocks: what it saves is worth
more than its place in the order. Blocks are told apart by their chained hashes, which hold tenant and adapter too.
"""

from __future__ import annotations

from collections.abc import Iterator

from router.queued import Queued


class PrefixGroups:
    """Hashes nothing before it is first asked for companions, and each prompt once."""

    def __init__(self) -> None:
        self._block_size = 0
        self._new: dict[int, Queued] = {}
        """Those that are not in `_halves` yet."""
        self._halves: dict[bytes, dict[int, Queued]] = {}
        """By the hash of the block with which the first half of their blocks ends."""

    def add(self, queued: Queued) -> None:
        if queued.hashes is not None:
            self._new[queued.key] = queued

    def remove(self, queued: Queued) -> None:
        """No effect if it was not added."""
        if self._new.pop(queued.key, None) is None and (half := self._half(queued)) is not None:
            members = self._halves.get(half, {})
            members.pop(queued.key, None)
            if not members:
                self._halves.pop(half, None)

    def half(self, queued: Queued, block_size: int) -> bytes | None:
        """Return the hash of the block with which the first half of its full blocks ends; None for a prompt without a
        full block."""
        if block_size != self._block_size:
            self._restart(block_size)
        return self._half(queued)

    def companions(self, queued: Queued, block_size: int) -> Iterator[tuple[Queued, int]]:
        """Yield those that may go with `queued`, which is not among them, and how many tokens they share; those that
        share most first, then by arrival. The caller may remove what it was given."""
        if block_size != self._block_size:
            self._restart(block_size)
        for each in self._new.values():
            if (half := self._half(each)) is not None:
                self._halves.setdefault(half, {})[each.key] = each
        self._new.clear()
        if not self._halves or queued.hashes is None:
            return
        blocks = queued.hashes.of(block_size)
        for block in reversed(blocks):
            for member in list(self._halves.get(block, {}).values()):
                assert member.hashes is not None
                yield member, _num_common(blocks, member.hashes.of(block_size)) * block_size

    def _half(self, queued: Queued) -> bytes | None:
        """None for a prompt without a full block."""
        return queued.hashes.half(self._block_size) if queued.hashes is not None and self._block_size else None

    def _restart(self, block_size: int) -> None:
        known = [each for members in self._halves.values() for each in members.values()]
        self._new = {each.key: each for each in (*known, *self._new.values())}
        self._halves.clear()
        self._block_size = block_size

    def check_integrity(self, waiting: dict[int, Queued]) -> None:
        """Assert that all that can be found waits; for tests."""
        known = {key for members in self._halves.values() for key in members}
        assert all(self._halves.values())
        assert known | self._new.keys() <= waiting.keys()
        assert not known & self._new.keys()


def _num_common(one: list[bytes], other: list[bytes]) -> int:
    """Return how many leading hashes are equal. As they are chained, no two are equal behind the first difference."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            low = middle
        else:
            high = middle - 1
    return low
