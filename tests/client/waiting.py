"""Waiting for what must happen soon, without a fixed sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(condition: Callable[[], object], *, seconds: float = 30.0) -> None:
    """Return when `condition()` is true; fail if that does not happen in time."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - the condition is anybody's state, not ours to signal
            await asyncio.sleep(0.002)
