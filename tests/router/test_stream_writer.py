"""Writes that get stuck are broken off, and only these."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import pytest
from octavo.names import Reason

from router.stream_writer import StreamWriter
from workers.errors import OverloadedError


class Context:
    """Of a call whose client reads when told to."""

    def __init__(self) -> None:
        self.reads = asyncio.Event()
        self.written: list[object] = []

    async def write(self, message: object) -> None:
        await self.reads.wait()
        self.written.append(message)


async def start_write(context: Any) -> tuple[asyncio.Task[None], StreamWriter]:
    """Return a task in the middle of a write, and its writer, whose limit is a hundred seconds: more than this process
    may be held up."""
    writers: list[StreamWriter] = []

    async def write() -> None:
        writers.append(StreamWriter(context, 100.0))
        await writers[0].write("one")
        await writers[0].write("two")

    task = asyncio.create_task(write())
    await asyncio.sleep(0)
    return task, writers[0]


async def test_a_write_within_the_limit_goes_on() -> None:
    context = Context()
    task, writer = await start_write(context)
    writer.check(time.monotonic() + 50.0)
    context.reads.set()
    await task
    assert context.written == ["one", "two"]
    writer.check(time.monotonic() + 500.0)  # nothing is being written


async def test_a_write_that_gets_stuck_is_broken_off() -> None:
    task, writer = await start_write(Context())
    writer.check(time.monotonic() + 101.0)
    writer.check(time.monotonic() + 102.0)
    with pytest.raises(OverloadedError) as caught:
        await task
    assert caught.value.reason == Reason.SLOW_CONSUMER
    assert not task.cancelling()


async def test_a_client_that_leaves_meanwhile_is_no_slow_one() -> None:
    task, writer = await start_write(Context())
    writer.check(time.monotonic() + 101.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_write_to_a_call_that_is_over_ends_as_if_it_were_cancelled() -> None:
    """Its client left a moment ago, and gRPC has not come to cancelling this task."""

    class Over(Context):
        async def write(self, message: object) -> None:
            await self.reads.wait()
            raise grpc.aio.InternalError("a batch failed")

    context = Over()
    task, _ = await start_write(context)
    context.reads.set()
    with pytest.raises(asyncio.CancelledError):
        await task
