"""Sessions that break, close and go away: no token lost or repeated, and nothing retried that must not be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

import grpc
import pytest
from grpc.aio import _call
from octavo.client import (
    Client,
    ConnectionFailedError,
    DeadlineExceededError,
    RequestCancelledError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
)
from octavo.client.generation import Generation
from octavo.names import Reason

from tests.client.scripted_router import ScriptedRouter, expected_ids, expected_text, pb
from tests.client.waiting import until

BREAKS = [
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
]


async def read(generation: Generation, received: list[int]) -> None:
    async for delta in generation:
        received.extend(delta.token_ids)


@pytest.mark.parametrize("code", BREAKS)
async def test_a_broken_session_is_attached_again_where_it_stopped(
    client: Client, router: ScriptedRouter, code: grpc.StatusCode
) -> None:
    router.hold(3)
    received: list[int] = []
    generation = client.generate("p", max_tokens=10)
    reading = asyncio.create_task(read(generation, received))
    await until(lambda: len(received) == 3)
    router.break_sessions(code)
    await until(lambda: len(router.starts) == 2)
    router.release()
    await reading
    assert tuple(received) == expected_ids(10)
    assert list(router.starts[1].attach_offsets) == [3]
    assert router.starts[1].request_id == router.starts[0].request_id
    assert generation.usage is not None


async def test_an_answer_survives_many_breaks(client: Client, router: ScriptedRouter) -> None:
    router.tokens_per_delta = 3
    received: list[int] = []
    router.hold(0)
    reading = asyncio.create_task(read(client.generate("p", max_tokens=40), received))
    for held in range(4, 40, 4):
        router.let_grow(held)
        await until(lambda held=held: len(received) == held)
        router.break_sessions()
        await until(lambda: any(journal.connection for journal in router.journals.values()))
    router.release()
    await reading
    assert tuple(received) == expected_ids(40)


async def test_what_is_replayed_twice_is_dropped(client: Client, router: ScriptedRouter) -> None:
    router.replays_all = True
    router.hold(5)
    received: list[int] = []
    reading = asyncio.create_task(read(client.generate("p", max_tokens=9), received))
    await until(lambda: len(received) == 5)
    router.break_sessions()
    await until(lambda: len(router.starts) == 2)
    router.release()
    await reading
    assert tuple(received) == expected_ids(9)


async def test_a_request_without_tokens_starts_anew_on_a_router_that_forgot_it(
    client: Client, router: ScriptedRouter
) -> None:
    router.hold(0)
    answer = asyncio.create_task(client.complete("p"))
    await until(lambda: router.journals)
    router.break_sessions()
    router.forget()
    router.release()
    assert (await answer).token_ids == expected_ids(8)
    assert [list(start.attach_offsets) for start in router.starts] == [[], [0]]


async def test_a_begun_answer_that_the_router_forgot_goes_on(client: Client, router: ScriptedRouter) -> None:
    """As a router that has started anew: what the client has goes with the request."""
    router.hold(3)
    received: list[int] = []
    reading = asyncio.create_task(read(client.generate("p"), received))
    await until(lambda: len(received) == 3)
    router.break_sessions()
    router.forget()
    router.release()
    await reading
    assert tuple(received) == expected_ids(8)
    assert [list(each.ids) for each in router.starts[-1].request.received_token_ids] == [list(expected_ids(3))]


async def test_a_whole_answer_needs_no_terminal(client: Client, router: ScriptedRouter) -> None:
    """The last delta came, the Session broke before the Terminal, and the router forgot: nothing is missing."""
    router.hold(8)
    received: list[int] = []
    reading = asyncio.create_task(read(client.generate("p", max_tokens=8), received))
    await until(lambda: len(received) == 8)
    router.break_sessions()
    router.forget()
    await reading
    assert tuple(received) == expected_ids(8)


async def test_a_request_turned_away_is_tried_again_with_the_same_id(client: Client, router: ScriptedRouter) -> None:
    router.refusals = [pb.Terminal(code=14, reason="NO_REPLICA", message="none") for _ in range(3)]
    answer = await client.complete("p", request_id="mine")
    assert answer.text == expected_text(8)
    assert [start.request_id for start in router.starts] == ["mine"] * 4
    assert router.num_sessions == 1


async def test_what_is_left_of_the_timeout_goes_with_each_try(client: Client, router: ScriptedRouter) -> None:
    refusal = pb.Terminal(code=14, reason="NO_REPLICA")
    refusal.retry_delay.nanos = 100_000_000
    router.refusals = [refusal]
    await client.complete("p", timeout=20.0)
    first, second = (start.timeout.seconds + start.timeout.nanos / 1e9 for start in router.starts)
    assert second <= first - 0.1


async def test_an_answer_that_began_goes_on_when_the_router_has_to_give_it_up(
    client: Client, router: ScriptedRouter
) -> None:
    router.hold(2)
    received: list[int] = []
    reading = asyncio.create_task(read(client.generate("p", request_id="mine"), received))
    await until(lambda: len(received) == 2)
    journal = router.journals.pop("mine")
    assert journal.connection is not None
    journal.connection.send("mine", terminal=pb.Terminal(code=14, reason="REPLICA_LOST", message="replica r1 died"))
    router.release()
    await reading
    assert tuple(received) == expected_ids(8)
    assert [list(start.attach_offsets) for start in router.starts] == [[], []], "nobody has it any more"


async def test_the_best_of_several_goes_on_nowhere_else(client: Client, router: ScriptedRouter) -> None:
    """Another router would generate others and pick from these; it refused what the client has of the answer."""
    router.hold(2)
    received: list[int] = []
    reading = asyncio.create_task(read(client.generate("p", n=1, best_of=3), received))
    await until(lambda: len(received) == 2)
    router.break_sessions()
    router.forget()
    with pytest.raises(UnavailableError) as caught:
        await reading
    assert caught.value.reason == Reason.SESSION_LOST
    assert not router.starts[-1].request.received_token_ids


async def test_the_best_of_several_that_a_router_gives_up_is_not_tried_again(
    client: Client, router: ScriptedRouter
) -> None:
    router.hold(2)
    received: list[int] = []
    reading = asyncio.create_task(read(client.generate("p", n=1, best_of=3, request_id="mine"), received))
    await until(lambda: len(received) == 2)
    journal = router.journals.pop("mine")
    assert journal.connection is not None
    journal.connection.send("mine", terminal=pb.Terminal(code=14, reason="DRAINING", message="stopping"))
    with pytest.raises(UnavailableError, match="stopping"):
        await reading
    assert len(router.starts) == 1


async def test_retries_end_with_the_deadline(client: Client, router: ScriptedRouter) -> None:
    router.refusals = [pb.Terminal(code=14, reason="NO_REPLICA", message="none") for _ in range(10_000)]
    with pytest.raises((UnavailableError, DeadlineExceededError)):
        await client.complete("p", timeout=0.2)


async def test_retries_end_without_a_deadline(router: ScriptedRouter, make_client: Callable[..., Client]) -> None:
    router.refusals = [pb.Terminal(code=14, reason="NO_REPLICA", message="none") for _ in range(10_000)]
    async with make_client(router.address, retry_timeout_s=0.2) as client:
        with pytest.raises(UnavailableError, match="none") as caught:
            await client.complete("p")
    assert caught.value.reason == Reason.NO_REPLICA
    assert caught.value.retryable


async def test_nobody_there(router: ScriptedRouter, make_client: Callable[..., Client]) -> None:
    await router.stop()
    async with make_client(router.address, retry_timeout_s=0.2) as client:
        with pytest.raises(ConnectionFailedError, match=f"cannot reach {router.address}"):
            await client.complete("p")
        with pytest.raises(ConnectionFailedError, match=f"cannot reach {router.address}"):
            await client.health()


async def test_a_router_that_never_comes_back_ends_every_request(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.hold(2)
    async with make_client(router.address, retry_timeout_s=1.0) as client:
        generations = [client.generate("p") for _ in range(5)]
        await until(lambda: len(router.starts) == 5)
        await router.stop()
        for outcome in await asyncio.gather(*(each.complete() for each in generations), return_exceptions=True):
            assert isinstance(outcome, UnavailableError)


async def test_a_router_that_starts_again_serves_what_waits(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.hold(0)
    async with make_client(router.address) as client:
        answers = [asyncio.create_task(client.complete("p", max_tokens=5)) for _ in range(20)]
        await until(lambda: len(router.starts) == 20)
        await router.stop()
        router.forget()
        router.release()
        await router.start()
        assert [(await answer).token_ids for answer in answers] == [expected_ids(5)] * 20


async def test_a_session_that_is_refused_ends_its_requests_at_once(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.session_error = (grpc.StatusCode.UNAUTHENTICATED, "who are you")
    async with make_client(router.address) as client:
        with pytest.raises(UnauthenticatedError, match="who are you"):
            await client.complete("p")
        router.session_error = None
        assert (await client.complete("p")).text == expected_text(8)


async def test_the_routers_status_counts_when_a_write_met_the_end_of_the_call(
    client: Client, router: ScriptedRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpc.aio sets INTERNAL when a write fails, and the router's status only afterwards."""
    has_failed = asyncio.Event()

    async def write(call: Any, _message: object) -> None:
        call._cython_call.set_internal_error("the stream is over")
        has_failed.set()
        await call._raise_for_status()

    async def read(call: Any) -> None:
        await has_failed.wait()
        await call._raise_for_status()

    monkeypatch.setattr(_call.StreamStreamCall, "write", write)
    monkeypatch.setattr(_call.StreamStreamCall, "read", read)
    answer = asyncio.create_task(client.complete("p"))
    await has_failed.wait()
    await until(lambda: router.sessions)
    router.break_sessions(grpc.StatusCode.UNIMPLEMENTED)
    with pytest.raises(UnimplementedError, match="broken by the test"):
        await answer
    assert router.num_sessions == 1


async def test_go_away_lets_running_answers_finish_and_new_ones_go_elsewhere(
    client: Client, router: ScriptedRouter
) -> None:
    router.hold(2)
    received: list[int] = []
    old = asyncio.create_task(read(client.generate("old", max_tokens=6), received))
    await until(lambda: len(received) == 2)
    first = router.sessions[0]
    router.announce_go_away()
    await until(lambda: first.go_away is None)
    router.let_grow(3)
    await until(lambda: len(received) == 3)  # what came after GoAway on the same stream: the client has read both
    new = client.generate("new", max_tokens=4)
    await until(lambda: len(router.starts) == 2)
    assert router.num_sessions == 2
    assert len({connection.peer for connection in router.sessions}) == 2, (
        "a Session after GoAway has its own connection"
    )
    router.release()
    await old
    assert tuple(received) == expected_ids(6)
    assert (await new.complete()).token_ids == expected_ids(4)
    assert [list(start.attach_offsets) for start in router.starts] == [[], []]
    await until(lambda: first not in router.sessions)


async def test_go_away_prefers_another_address(
    router: ScriptedRouter, other_router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    async with make_client(router.address, other_router.address) as client:
        await asyncio.gather(*(client.complete("p") for _ in range(4)))
        assert (len(router.starts), len(other_router.starts)) == (2, 2)
        router.announce_go_away()
        await until(lambda: not router.sessions)
        await asyncio.gather(*(client.complete("p") for _ in range(4)))
        assert (len(router.starts), len(other_router.starts)) == (2, 6)


async def test_an_address_that_only_says_go_away_is_not_dialled_in_a_loop(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.goes_away_at_once = True
    router.refusals = [pb.Terminal(code=14, reason="DRAINING", message="draining") for _ in range(10_000)]
    async with make_client(router.address) as client:
        with pytest.raises((UnavailableError, DeadlineExceededError)):
            await client.complete("p", timeout=0.3)
    assert router.num_sessions < 60


async def test_a_dead_address_does_not_hold_up_a_live_one(
    router: ScriptedRouter, other_router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    await router.stop()
    async with make_client(router.address, other_router.address) as client:
        answers = await asyncio.gather(*(client.complete("p") for _ in range(6)))
        assert [answer.token_ids for answer in answers] == [expected_ids(8)] * 6
        assert await client.health()
        await client.complete("p", timeout=10.0)


async def test_a_request_without_tokens_moves_to_another_address(
    router: ScriptedRouter, other_router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.hold(0)
    async with make_client(router.address, other_router.address) as client:
        answers = [asyncio.create_task(client.complete("p")) for _ in range(2)]
        await until(lambda: router.starts and other_router.starts)
        await router.stop()
        assert [(await answer).token_ids for answer in answers] == [expected_ids(8)] * 2
        assert len(other_router.starts) == 2


async def test_a_bug_in_the_writer_ends_requests_and_hangs_none(
    router: ScriptedRouter, make_client: Callable[..., Client], caplog: pytest.LogCaptureFixture
) -> None:
    async with make_client(router.address, retry_timeout_s=1.0) as client:
        generation = client.generate("p")
        generation._exchange.deadline = float("inf")  # no Duration holds it
        with pytest.raises(UnavailableError):
            await generation.complete()
        assert "a Session's writer failed" in caplog.text
        assert (await client.complete("p")).text == expected_text(8)


async def test_a_request_that_never_left_is_not_cancelled_at_the_router(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    """It was given up while its Start could not be made; the next Session began with that Start, to cancel it, broke as
    well, and so did those that followed."""
    async with make_client(router.address, retry_timeout_s=5.0) as client:
        generation = client.generate("p")
        tries = []

        def start(now: float) -> NoReturn:
            tries.append(now)
            generation.cancel()
            raise OverflowError

        generation._exchange.start = start  # type: ignore[method-assign]
        with pytest.raises(RequestCancelledError):
            await generation.complete()
        assert (await client.complete("p")).text == expected_text(8)
        assert len(tries) == 1


async def test_leaving_the_client_cancels_what_runs_and_is_quick(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    router.hold(1)
    async with make_client(router.address, close_timeout_s=20.0) as client:
        readings = [asyncio.create_task(client.complete("p")) for _ in range(3)]
        await until(lambda: len(router.starts) == 3)
    assert len(router.cancels) == 3
    for outcome in await asyncio.gather(*readings, return_exceptions=True):
        assert getattr(outcome, "reason", None) == Reason.CANCELLED
    await until(lambda: not router.sessions)


async def test_an_answer_whose_router_is_gone_goes_on_at_another_address(
    router: ScriptedRouter, make_client: Callable[..., Client]
) -> None:
    other = ScriptedRouter()
    await other.start()
    try:
        router.hold(3)
        other.hold(3)
        async with make_client(router.address, other.address) as client:
            received: list[list[int]] = [[], []]
            reading = [asyncio.create_task(read(client.generate("p", max_tokens=8), each)) for each in received]
            await until(lambda: all(len(each) == 3 for each in received))
            assert len(router.starts) == len(other.starts) == 1
            await router.stop()
            other.release()
            await asyncio.gather(*reading)
        assert [tuple(each) for each in received] == [expected_ids(8)] * 2
        assert [list(each.ids) for each in other.starts[-1].request.received_token_ids] == [list(expected_ids(3))]
    finally:
        await other.stop()
