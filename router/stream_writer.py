"""One call's writes, of which none may take longer than a limit: who never reads must not hold a stream for ever.

A write costs one look at the clock and no timer; whoever made the writer calls `check` from time to time. Knows no
answers: what has to be given up with the stream is for its caller.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
from octavo.names import Reason

from workers.errors import OverloadedError


class StreamWriter:
    """Belongs to the task that writes."""

    __slots__ = ("_context", "_is_stuck", "_limit_s", "_since", "_task")

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any], limit_s: float) -> None:
        self._context = context
        self._limit_s = limit_s
        self._task = asyncio.current_task()
        self._since: float | None = None
        """When the write began that is under way; on ``time.monotonic``."""
        self._is_stuck = False

    async def write(self, message: object) -> None:
        """Return when gRPC has taken `message`. Raises OverloadedError if it does not within the limit; then the call
        can only be aborted. Raises CancelledError if the call is over."""
        self._since = time.monotonic()
        try:
            await self._context.write(message)
        except asyncio.CancelledError:
            assert self._task is not None
            if self._is_stuck and self._task.uncancel() == 0:
                raise slow_consumer(self._limit_s) from None
            raise
        except grpc.aio.InternalError:  # in the moment in which a client leaves, before gRPC cancels this task
            raise asyncio.CancelledError from None
        finally:
            self._since = None

    def check(self, now: float) -> None:
        """Break off the write that is under way if it has taken too long."""
        if self._since is not None and not self._is_stuck and now - self._since > self._limit_s:
            assert self._task is not None
            self._is_stuck = True
            self._task.cancel()


def slow_consumer(limit_s: float) -> OverloadedError:
    """Return what ends an answer, or a stream, that its client does not read."""
    return OverloadedError(
        f"nothing of this answer was taken for {limit_s:g} s; read it, or grant a window", reason=Reason.SLOW_CONSUMER
    )
