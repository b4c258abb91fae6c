"""Which of several replicas a key prefers: consistent hashing, so that few keys move when a replica comes or goes.

Each replica has `POINTS` places on a circle, and a key prefers whose place comes first behind its own. Pure.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Final

POINTS: Final = 16
_CIRCLE: Final = 1 << 64


class Circle:
    """The places of all replicas, by the slots that their owner gives them."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        """(place, slot), in order."""

    def join(self, slot: int, replica: str) -> None:
        for place in _places(replica):
            insort(self._places, (place, slot))

    def leave(self, slot: int, replica: str) -> None:
        for place in _places(replica):
            del self._places[bisect_left(self._places, (place, slot))]

    def favourite(self, key: str, slots: int) -> int:
        """Return which of `slots` (a bit each, at least one of a replica that is here) `key` prefers."""
        places = self._places
        start = bisect_left(places, (_place(key), 0))
        for i in range(start, start + len(places)):
            slot = places[i % len(places)][1]
            if slots >> slot & 1:
                return slot
        raise AssertionError("none of the slots is on the circle")


def favourite(key: str, replicas: Iterable[str]) -> str:
    """Return which of `replicas` `key` prefers: the same as a circle does."""
    start = _place(key)
    return min(replicas, key=lambda replica: min((place - start) % _CIRCLE for place in _places(replica)))


def _places(replica: str) -> list[int]:
    digest = hashlib.shake_128(replica.encode()).digest(8 * POINTS)
    return [int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8)]


def _place(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
