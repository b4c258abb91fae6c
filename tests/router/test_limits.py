"""What one connection may do: how long it lasts, how many calls it has at once, how much metadata a call brings."""

from __future__ import annotations

import asyncio
import math

import grpc
import pytest
from octavo.client import Client
from octavo.names import Reason

from tests.router.rig import answering, eventually, running, text_request


async def test_a_session_of_age_is_told_to_go_and_loses_nothing() -> None:
    async with running(max_connection_age_s=0.2) as rig, rig.open_session() as session:
        await session.start("s", text_request())
        work = await rig.backend.work()
        await session.until(lambda: session.go_away is not None)
        assert session.go_away is not None
        assert session.go_away.reason == Reason.SESSION_AGE
        await asyncio.sleep(0.1)
        work.emit("late")
        work.finish()
        outcome = await session.outcome("s")
        assert (outcome.code, outcome.text) == (grpc.StatusCode.OK, "late")


async def test_the_client_library_changes_connections_and_nobody_notices() -> None:
    async with running(max_connection_age_s=0.1) as rig, Client(rig.address) as client:
        rig.backend.script = answering("ok")
        begun = asyncio.get_running_loop().time()
        while asyncio.get_running_loop().time() < begun + 1.0:
            assert (await client.complete("hi", timeout=10)).text == "ok"
        await eventually(lambda: rig.server.sessions.num_open <= 1)


async def test_connections_may_last_for_ever() -> None:
    """gRPC takes no more milliseconds than 24 days have: the server could not be made."""
    async with running(max_connection_age_s=math.inf) as rig:
        rig.backend.script = answering("ok")
        assert (await rig.session(text_request())).text == "ok"


async def test_more_calls_than_a_connection_may_have_wait_for_each_other() -> None:
    async with running(max_concurrent_calls=2) as rig:
        calls = [asyncio.create_task(rig.generate(text_request())) for _ in range(3)]
        first, second = [await rig.backend.work(index) for index in range(2)]
        await asyncio.sleep(0.1)
        assert len(rig.backend.works) == 2
        for work in (first, second):
            work.emit("a")
            work.finish()
        (await rig.backend.work(2)).finish()
        assert [outcome.code for outcome in await asyncio.gather(*calls)] == [grpc.StatusCode.OK] * 3


async def test_too_much_metadata_is_refused_and_costs_nobody_else() -> None:
    async with running(max_metadata_bytes=8_192) as rig:
        rig.backend.script = answering("ok")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.stub.Generate(text_request(), metadata=[("x", "y" * 9_000)]).read()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await rig.generate(text_request(), metadata=[("x", "y" * 4_000)])).code is grpc.StatusCode.OK
        assert len(rig.backend.works) == 1
