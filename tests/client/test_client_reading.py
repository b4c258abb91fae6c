"""Readers: windows and grants, slow ones, those who leave, those who run out of time."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable

import pytest
from octavo.client import Backoff, Client, DeadlineExceededError, RequestCancelledError
from octavo.names import Reason

from tests.client.scripted_router import ScriptedRouter, expected_ids
from tests.client.waiting import until


async def test_an_unread_answer_stops_at_its_window(router: ScriptedRouter, make_client: Callable[..., Client]) -> None:
    async with make_client(router.address, window=8) as client:
        generation = client.generate("p", max_tokens=100, request_id="slow")
        await until(lambda: "slow" in router.journals and router.journals["slow"].num_sent == 8)
        assert (await client.complete("p", max_tokens=300)).token_ids == expected_ids(300), "siblings go on"
        assert router.journals["slow"].num_sent == 8
        assert generation._exchange.num_buffered_tokens == 8
        assert (await generation.complete()).token_ids == expected_ids(100)


async def test_the_router_is_never_allowed_more_than_a_window(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    async with make_client(router.address, window=10) as client:
        num_read = 0
        async for delta in client.generate("p", max_tokens=95, request_id="r"):
            num_read += len(delta.token_ids)
            journal = router.journals.get("r")
            assert journal is None or journal.num_sent - num_read <= 10
        assert num_read == 95
    granted = sum(tokens for _, tokens in router.grants)
    assert 85 <= granted <= 95
    assert all(tokens >= 5 for _, tokens in router.grants), "grants come by halves of a window"


async def test_a_window_of_one(router: ScriptedRouter, make_client: Callable[..., Client]) -> None:
    async with make_client(router.address, window=1) as client:
        assert (await client.complete("p", max_tokens=12)).token_ids == expected_ids(12)


async def test_the_window_after_a_break_leaves_room_for_what_is_unread(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    async with make_client(router.address, window=8) as client:
        generation = client.generate("p", max_tokens=30)
        await until(lambda: generation._exchange.num_buffered_tokens == 8)
        router.break_sessions()
        await until(lambda: len(router.starts) == 2)
        assert router.starts[1].HasField("window")
        assert router.starts[1].window == 0
        assert list(router.starts[1].attach_offsets) == [8]
        assert (await generation.complete()).token_ids == expected_ids(30)


async def test_leaving_the_loop_cancels(client: Client, router: ScriptedRouter) -> None:
    router.hold(3)
    generation = client.generate("p", request_id="left")
    async for _ in generation:
        break
    await until(lambda: router.cancels == ["left"])
    assert generation.is_ended
    assert not client._flights._flights  # type: ignore[union-attr]


async def test_an_error_in_the_loop_cancels(client: Client, router: ScriptedRouter) -> None:
    router.hold(3)

    async def fail() -> None:
        async for _ in client.generate("p", request_id="left"):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    await until(lambda: router.cancels == ["left"])


async def test_cancelling_the_task_that_reads_cancels(client: Client, router: ScriptedRouter) -> None:
    router.hold(3)
    reading = asyncio.create_task(client.complete("p", request_id="left"))
    await until(lambda: router.starts)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await until(lambda: router.cancels == ["left"])


async def test_dropping_an_answer_unread_cancels(client: Client, router: ScriptedRouter) -> None:
    router.hold(3)
    generation = client.generate("p", request_id="dropped")
    await until(lambda: router.starts)
    del generation
    gc.collect()
    await until(lambda: router.cancels == ["dropped"])


async def test_closing_an_answer_cancels_and_forgets(client: Client, router: ScriptedRouter) -> None:
    router.hold(3)
    async with client.generate("p", request_id="closed") as generation:
        await until(lambda: generation._exchange.num_buffered_tokens == 3)
    await until(lambda: router.cancels == ["closed"])
    with pytest.raises(RequestCancelledError):
        await generation.complete()
    generation.cancel()


async def test_a_cancel_before_the_start_left_says_nothing(client: Client, router: ScriptedRouter) -> None:
    await client.complete("first")
    client.generate("p").cancel()
    await client.complete("last")
    assert len(router.starts) == 2
    assert not router.cancels


async def test_a_cancel_while_the_session_is_broken_reaches_the_router(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.hold(2)
    async with make_client(router.address, backoff=Backoff(first_s=1.5, max_s=1.5)) as client:
        generation = client.generate("p", request_id="gone")
        await until(lambda: generation._exchange.num_buffered_tokens == 2)
        router.break_sessions()
        await until(lambda: client._flights.links[0]._waiting)  # type: ignore[union-attr]
        await generation.aclose()
        await until(lambda: router.cancels == ["gone"])
        assert "gone" not in router.journals


async def test_a_cancel_that_was_lost_with_its_session_is_repeated(client: Client, router: ScriptedRouter) -> None:
    """The client cancelled into a connection that was already dead, and the router went on for its whole grace."""
    router.hold(2)
    generation = client.generate("p", request_id="gone")
    await until(lambda: generation._exchange.num_buffered_tokens == 2)
    router.break_sessions()
    generation.cancel()
    await until(lambda: "gone" in router.cancels)
    await until(lambda: "gone" not in router.journals)


async def test_a_timeout_ends_the_request_here_and_there(client: Client, router: ScriptedRouter) -> None:
    router.hold(2)
    assert await client.health()  # and so there is a connection
    reading = aiter(client.generate("p", timeout=1.0, request_id="late"))
    assert [(await anext(reading)).token_offset for _ in range(2)] == [0, 1], "what came before is delivered"
    with pytest.raises(DeadlineExceededError) as caught:
        await anext(reading)
    assert caught.value.reason == Reason.DEADLINE_PASSED
    await until(lambda: router.cancels == ["late"])


async def test_two_readers_of_one_answer_are_a_mistake(client: Client, router: ScriptedRouter) -> None:
    router.hold(0)
    generation = client.generate("p")
    first = asyncio.create_task(generation.complete())
    await until(lambda: router.starts)
    with pytest.raises(RuntimeError, match="one reader"):
        await generation.complete()
    with pytest.raises(RequestCancelledError):
        await first
