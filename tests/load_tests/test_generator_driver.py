"""A driver before a target that is played by hand: what is due when, what counts how, that each request ends once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from octavo.client import Delta, InvalidArgumentError, RequestCancelledError, ResourceExhaustedError, Usage

from load_tests.generator.caller import Answer
from load_tests.generator.driver import Driver, Part
from load_tests.generator.request import PlannedRequest
from load_tests.generator.scenario import FOLDER, parse_scenario
from load_tests.generator.tally import Tally


class ScriptedAnswer:
    """Says `num_tokens` tokens after `pause_s`, or raises `error`."""

    def __init__(self, target: ScriptedTarget, request: PlannedRequest) -> None:
        self._target = target
        self._is_cancelled = asyncio.Event()
        self.usage: Usage | None = None
        self.request = request

    def cancel(self) -> None:
        self._is_cancelled.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        target = self._target
        async with target.lock:
            try:
                async with asyncio.timeout(target.pause_s):
                    await self._is_cancelled.wait()
                raise RequestCancelledError("cancelled", reason="CANCELLED")
            except TimeoutError:
                pass
        error = target.error(self.request)
        if error is not None:
            raise error
        for offset in range(target.num_tokens):
            yield Delta(f"w{offset}", (offset,), 0, offset)
            if target.stall_s:
                time.sleep(target.stall_s)  # noqa: ASYNC251  a generator that is late itself
        self.usage = Usage(
            prompt_tokens=10, cached_tokens=4, generated_tokens=target.num_tokens,
            queue_s=target.own_s, prefill_s=0, decode_s=0, replica="r1",
        )  # fmt: skip


@dataclass
class ScriptedTarget:
    """A caller; `lock` makes it serve one request after the other."""

    num_tokens: int = 3
    pause_s: float = 0.001
    stall_s: float = 0.0
    own_s: float = 0.0
    is_serial: bool = False
    error: Callable[[PlannedRequest], Exception | None] = lambda _: None
    requests: list[PlannedRequest] = field(default_factory=list)

    @property
    def lock(self) -> Any:
        if not hasattr(self, "_lock"):
            self._lock = asyncio.Lock() if self.is_serial else asyncio.Semaphore(10_000)
        return self._lock

    async def open(self) -> None: ...

    def call(self, request: PlannedRequest) -> Answer:
        self.requests.append(request)
        return ScriptedAnswer(self, request)

    async def close(self) -> None: ...


async def drive(target: ScriptedTarget, **changes: Any) -> Tally:
    """Run 20 requests in 0.2 s, unless `changes` say otherwise, and check that each ended in one way."""
    table = {
        "name": "toy",
        "arrivals": {"process": "constant", "rate": 100, "duration_s": 0.2},
        "limits": {"drain_s": 5},
        "kinds": [{"name": "one"}],
        **changes,
    }
    driver = Driver(parse_scenario(table, FOLDER), Part(0, 1), target)
    async with asyncio.timeout(20):
        await driver.run(time.monotonic())
    tally = driver.tally
    assert driver.num_open == 0
    for group in (tally.all, *tally.kinds.values(), *tally.tenants.values(), *tally.intervals.values()):
        assert group.sent == group.ok + group.cancelled + group.refused + group.failed
    assert sum(tally.errors.values()) == tally.all.failed
    assert sum(group.sent for group in tally.intervals.values()) == tally.all.sent
    return tally


async def test_answers_are_read_and_accounted() -> None:
    tally = await drive(ScriptedTarget())
    assert (tally.all.sent, tally.all.ok, tally.all.good, tally.all.tokens) == (20, 20, 20, 60)
    assert (tally.prompt_tokens, tally.cached_tokens, tally.deltas) == (200, 80, 60)
    assert sum(tally.arrived.values()) == 60
    assert tally.replicas["r1"].load == 20 * (10 - 4 + 3)
    assert tally.all.first_token.count == tally.all.total.count == tally.per_token.count == 20
    assert tally.gap.count == 40


async def test_waiting_behind_others_is_counted_from_when_the_request_was_due() -> None:
    """Coordinated omission: a target that serves one request at a time, in 20 ms, is sent one every 10 ms all the same,
    so that number n waits for n before it, n * 10 ms too long. Counted from when each began, all would take 20 ms."""
    tally = await drive(ScriptedTarget(pause_s=0.02, is_serial=True))
    assert tally.all.sent == 20
    assert tally.all.total.max >= 20 * 0.02 - 19 * 0.01
    assert tally.all.total.mean is not None
    assert tally.all.total.mean >= 0.02 + 0.01 * 19 / 2 - 0.001


async def test_a_generator_that_is_late_does_not_hide_it() -> None:
    arrivals = {"process": "constant", "rate": 20, "duration_s": 0.2}
    tally = await drive(ScriptedTarget(num_tokens=1, stall_s=0.1), arrivals=arrivals)
    assert tally.all.sent == 4
    assert tally.lag.max >= 0.05
    assert tally.all.first_token.max >= tally.lag.max


async def test_cancelled_requests_are_no_errors() -> None:
    kinds = [{"name": "one", "cancel_share": 1.0, "cancel_after_s": 0}]
    tally = await drive(ScriptedTarget(pause_s=5), kinds=kinds)
    assert (tally.all.cancelled, tally.all.failed) == (20, 0)


async def test_a_cancel_that_comes_after_the_end_changes_nothing() -> None:
    kinds = [{"name": "one", "cancel_share": 1.0, "cancel_after_s": 3}]
    assert (await drive(ScriptedTarget(), kinds=kinds)).all.ok == 20


async def test_errors_are_told_apart_by_code_and_reason() -> None:
    target = ScriptedTarget(error=lambda _: ResourceExhaustedError("full", reason="QUEUE_FULL"))
    tally = await drive(target)
    assert tally.errors == {"RESOURCE_EXHAUSTED/QUEUE_FULL": 20}
    assert tally.all.first_token.count == 0


async def test_poison_must_be_refused_and_with_its_own_code() -> None:
    kinds = [{"name": "one", "poisons": ["empty_prompt"]}]
    refused = await drive(ScriptedTarget(error=lambda _: InvalidArgumentError("no")), kinds=kinds)
    assert (refused.all.refused, refused.all.failed) == (20, 0)
    answered = await drive(ScriptedTarget(), kinds=kinds)
    assert answered.errors == {"NOT_REFUSED/INVALID_ARGUMENT": 20}
    wrong = await drive(ScriptedTarget(error=lambda _: ResourceExhaustedError("full")), kinds=kinds)
    assert wrong.errors == {"RESOURCE_EXHAUSTED": 20}


async def test_what_never_ends_is_cut_off_and_told() -> None:
    tally = await drive(ScriptedTarget(pause_s=60), limits={"drain_s": 0.1})
    assert tally.errors == {"NO_TERMINAL": 20}


async def test_too_many_at_once_are_not_sent_and_told() -> None:
    target = ScriptedTarget(pause_s=60)
    tally = await drive(target, limits={"drain_s": 0.1, "in_flight": 5})
    assert tally.errors == {"NO_TERMINAL": 5, "GENERATOR_FULL": 15}
    assert len(target.requests) == 5


async def test_no_more_requests_than_allowed_turns_included() -> None:
    target = ScriptedTarget()
    tally = await drive(target, limits={"requests": 7}, kinds=[{"name": "one", "turns": 3}])
    assert tally.all.sent == len(target.requests) == 7


async def test_a_closed_loop_never_has_more_open_than_users() -> None:
    target = ScriptedTarget(pause_s=0.01, is_serial=True)
    arrivals = {"process": "closed", "concurrency": 3, "duration_s": 5}
    tally = await drive(target, arrivals=arrivals, limits={"requests": 12})
    assert tally.all.ok == 12
    assert tally.all.total.min >= 0.01
    # Three users: nobody waits for more than the two others.
    assert sorted(request.request_id for request in target.requests) == sorted(f"1-{number}-0" for number in range(12))


async def test_the_next_turn_repeats_the_answer() -> None:
    target = ScriptedTarget()
    kinds = [{"name": "one", "turns": 2, "prompt": {"own": 4}}]
    await drive(target, kinds=kinds, arrivals={"process": "constant", "rate": 0.1, "duration_s": 10})
    first, second = target.requests
    assert list(second.prompt)[:7] == [*first.prompt, 0, 1, 2]


async def test_an_answer_after_its_deadline_is_late_and_not_good() -> None:
    kinds = [{"name": "one", "timeout_s": 1}]
    tally = await drive(ScriptedTarget(own_s=1.5), kinds=kinds)
    assert (tally.all.ok, tally.all.good, tally.late) == (20, 0, 20)


async def test_good_is_what_meets_every_objective() -> None:
    tally = await drive(ScriptedTarget(pause_s=0.05), slo={"first_token_s": 0.04})
    assert (tally.all.ok, tally.all.good) == (20, 0)
    tally = await drive(ScriptedTarget(), slo={"first_token_s": 60, "per_token_s": 60, "total_s": 60})
    assert tally.all.good == 20


async def test_tokens_that_tell_the_time_have_an_age() -> None:
    clock = {"first": 5, "ticks": 1_000, "ticks_per_s": 100}
    scenario = parse_scenario(
        {"name": "toy", "clock": clock, "kinds": [{"name": "one"}],
         "arrivals": {"process": "constant", "rate": 1, "duration_s": 1}}, FOLDER
    )  # fmt: skip
    assert scenario.clock is not None
    assert scenario.clock.age_s(5 + 250, 102.75) == pytest.approx(0.25)
    assert scenario.clock.age_s(5 + 990, 100.4) == pytest.approx(0.5)  # over the wrap
    assert (await drive(ScriptedTarget(), clock=clock)).age.count == 60


async def test_a_bug_of_the_generator_is_not_a_result() -> None:
    def explode(_: PlannedRequest) -> Exception:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await drive(ScriptedTarget(error=explode))
