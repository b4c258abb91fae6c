"""How long streams wait between messages."""

from __future__ import annotations

import heapq
import time
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import servicer
from router.pace import Pace
from tests.router.rig import running, text_request


def test_few_messages_wait_for_nothing() -> None:
    pace = Pace(free_per_s=1_000, burst=4, max_wait_s=0.01)
    assert [pace.wait_s(0.002 * number) for number in range(50)] == [0.0] * 50


def test_a_burst_is_spread_up_to_the_limit() -> None:
    pace = Pace(free_per_s=1_000, burst=4, max_wait_s=0.003)
    waits = [round(1e3 * pace.wait_s(5.0)) for _ in range(9)]
    assert waits == [0, 0, 0, 0, 1, 2, 3, 3, 3]
    assert pace.wait_s(5.1) == 0.0


def messages_in_a_second(num_streams: int, pace: Pace, *, every_ms: int) -> int:
    """Streams with a token every so often, all at once as steps bring them, which write as soon as they may and have
    something."""
    ready = [(0.0, number) for number in range(num_streams)]
    num_messages = 0
    while ready[0][0] < 1_000:
        now_ms, number = heapq.heappop(ready)
        num_messages += 1
        wait_ms = 1e3 * pace.wait_s(now_ms / 1e3)
        next_token_ms = (int(now_ms) // every_ms + 1) * every_ms
        heapq.heappush(ready, (max(next_token_ms, now_ms + wait_ms), number))
    return num_messages


def test_many_streams_share_messages_and_few_do_not() -> None:
    """64 streams at 200 tokens/s were 12,800 messages a second, more than a router can write."""
    assert messages_in_a_second(8, Pace(), every_ms=5) == 8 * 200
    assert 64 * 60 <= messages_in_a_second(64, Pace(), every_ms=5) <= 64 * 80
    assert messages_in_a_second(64, Pace(), every_ms=50) == 64 * 20


@given(st.lists(st.floats(0.0, 0.02), max_size=60))
def test_no_wait_is_longer_than_allowed(gaps: list[float]) -> None:
    pace, now = Pace(free_per_s=500, burst=2, max_wait_s=0.01), 100.0
    for gap in gaps:
        now += gap
        assert 0.0 <= pace.wait_s(now) <= 0.01 + 1e-9


async def test_what_comes_while_a_stream_waits_comes_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first message does not wait, and neither do those of a router that has little to write."""
    monkeypatch.setattr(servicer, "Pace", partial(Pace, free_per_s=1, burst=0, max_wait_s=0.5))
    async with running() as rig:
        began = time.monotonic()
        call = rig.stub.Generate(text_request(), timeout=10)
        work = await rig.backend.work()
        work.emit("a")
        assert [delta.text for delta in (await call.read()).deltas] == ["a"]
        for token in "bc":
            work.emit(token)
        work.finish()
        last = await call.read()
        assert [(delta.text, delta.token_offset) for delta in last.deltas] == [("bc", 1)]
        assert last.HasField("usage")
        assert time.monotonic() - began >= 0.4
