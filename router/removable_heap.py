"""Keys in an order, any of which can be taken out again. Pure; knows neither requests nor time.

Removed keys stay in the underlying heap until they surface or outnumber the live ones, so memory stays proportional to
the live keys however many are cancelled.
"""

from __future__ import annotations

import heapq
from typing import Any

SLACK = 64
"""Dead entries that are not worth a rebuild."""


class RemovableHeap:
    """Unique integer keys ordered by any comparable value; equal values by key."""

    __slots__ = ("_entries", "_orders")

    def __init__(self) -> None:
        self._entries: list[tuple[Any, int]] = []
        self._orders: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._orders)

    def __contains__(self, key: int) -> bool:
        return key in self._orders

    def push(self, key: int, order: Any) -> None:
        assert key not in self._orders
        self._orders[key] = order
        heapq.heappush(self._entries, (order, key))

    def discard(self, key: int) -> None:
        """Take `key` out; unknown keys have no effect."""
        if self._orders.pop(key, None) is None:
            return
        if len(self._entries) > 2 * len(self._orders) + SLACK:
            self._entries = [(order, key) for key, order in self._orders.items()]
            heapq.heapify(self._entries)

    def first(self) -> tuple[Any, int] | None:
        """Return the least (order, key), or None when empty."""
        while self._entries:
            order, key = self._entries[0]
            if self._orders.get(key, self) is order:
                return order, key
            heapq.heappop(self._entries)
        return None

    def check_integrity(self) -> None:
        """Assert that every live key is in the heap and that dead ones are bounded."""
        entries = {(id(order), key) for order, key in self._entries}
        assert all((id(order), key) in entries for key, order in self._orders.items())
        assert len(self._entries) <= 2 * len(self._orders) + SLACK + 1
