"""One timer of the event loop, which rings at the earliest of all times that it was set to."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable


class Alarm:
    """Calls `ring` once each time that it goes off. One that rings early does no harm: that is cheaper than to move it
    back whenever what it was set for has happened."""

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._handle: asyncio.TimerHandle | None = None
        self._at = math.inf

    def set(self, at: float, now: float) -> None:
        """Ring at `at` at the latest, infinity for never; both times on one clock, in seconds. On a running loop."""
        if at >= self._at:
            return
        self.cancel()
        self._at = at
        self._handle = asyncio.get_running_loop().call_later(max(at - now, 0.0), self._go_off)

    def cancel(self) -> None:
        """Do not ring until it is set again."""
        if self._handle is not None:
            self._handle.cancel()
        self._handle, self._at = None, math.inf

    def _go_off(self) -> None:
        self._handle, self._at = None, math.inf
        self._ring()
