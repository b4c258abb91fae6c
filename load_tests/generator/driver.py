"""Sends one process's part of a scenario on time; `Attempt` reads the answers and counts what happens.

An open loop sends each request when it is due, whatever became of those before it, and its times count from when it was
due: neither a slow server nor a slow generator hides waiting (no coordinated omission). A closed loop, and every later
turn of a conversation, is due when its user would ask: the pause after the answer before.

Every request ends in exactly one way. What is bounded: requests, those in flight, the time for the last to end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass

from octavo.client import GenerateOptions

from load_tests.generator.attempt import Attempt
from load_tests.generator.caller import Caller
from load_tests.generator.content import Content, Conversation, answer
from load_tests.generator.request import PlannedRequest
from load_tests.generator.scenario import Scenario
from load_tests.generator.tally import GENERATOR_FULL, NUM_INTERVALS, Tally

WARM_UP_S = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """Of the numbers 0, 1, 2, ... those that leave `index` when divided by `count`."""

    index: int
    count: int

    def __contains__(self, number: int) -> bool:
        return number % self.count == self.index


class Driver:
    """`tally` can be read while it runs. Not to be used twice."""

    def __init__(self, scenario: Scenario, part: Part, caller: Caller) -> None:
        arrivals, limits = scenario.arrivals, scenario.limits
        self.tally = Tally(interval_s=max(0.1, (arrivals.duration_s + limits.drain_s) / NUM_INTERVALS))
        self.num_open = 0
        self._scenario = scenario
        self._part = part
        self._caller = caller
        self._content = Content(scenario)
        self._max_open = -(-limits.in_flight // part.count)
        self._max_requests = -(-limits.requests // part.count)
        self._tasks: set[asyncio.Task[None]] = set()
        self._sender: asyncio.Task[None] | None = None
        self._failure: BaseException | None = None
        """Of the generator itself; what the target does is counted."""
        self._start = 0.0

    async def warm_up(self) -> None:
        """Connect, by a request that is not counted. Raises CallError if the target does not answer."""
        for number in range(self._scenario.call.streams):
            request = PlannedRequest(
                request_id=f"warm-up-{self._part.index}-{number}",
                kind="",
                tenant="warm_up",
                prompt=[int(self._scenario.kinds[0].prompt.vocabulary.low)],
                model=self._scenario.call.model,
                timeout_s=WARM_UP_S,
                options=GenerateOptions(max_tokens=1),
            )
            async for _ in self._caller.call(request):
                pass

    async def run(self, start: float) -> None:
        """Send from `start` on (monotonic) and return when the last request has ended, or its time is over."""
        self._start = start
        is_open = self._scenario.arrivals.is_open
        self._sender = asyncio.create_task(self._send_open() if is_open else self._send_closed())
        self._sender.add_done_callback(self._done)
        await asyncio.wait({self._sender}, timeout=self._left_s())
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._left_s())
        self.stop()
        await asyncio.gather(self._sender, *self._tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """Send nothing more and cut off what is open. `run` returns soon after."""
        for task in (self._sender, *self._tasks):
            if task is not None:
                task.cancel()

    def _left_s(self) -> float:
        arrivals, limits = self._scenario.arrivals, self._scenario.limits
        return max(0.0, self._start + arrivals.duration_s + limits.drain_s - time.monotonic())

    # Sending.

    async def _send_open(self) -> None:
        for number, at_s in self._schedule():
            conversation = self._content.conversation(number)
            due = self._start + at_s
            await self._pause_until(due)
            self._spawn(self._converse(conversation, due))

    def _schedule(self) -> Iterator[tuple[int, float]]:
        scenario = self._scenario
        offsets = scenario.arrivals.offsets(f"{scenario.seed} arrivals", scenario.trace)
        for number, at_s in enumerate(offsets):
            if number >= scenario.limits.requests:
                return
            if number in self._part:
                yield number, at_s

    async def _send_closed(self) -> None:
        for user in range(self._scenario.arrivals.concurrency):
            if user in self._part:
                self._spawn(self._use(user))

    async def _use(self, user: int) -> None:
        """Be one user of a closed loop, with the conversations user, user + concurrency, ..."""
        arrivals = self._scenario.arrivals
        due = self._start
        for number in range(user, self._scenario.limits.requests, arrivals.concurrency):
            await self._pause_until(due)
            if time.monotonic() >= self._start + arrivals.duration_s:
                return
            conversation = self._content.conversation(number)
            await self._converse(conversation, due)
            due = time.monotonic() + arrivals.think_s.draw(conversation.rng)

    async def _pause_until(self, due: float) -> None:
        await asyncio.sleep(max(0.0, due - time.monotonic()))

    def _spawn(self, conversing: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(conversing)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()

    async def _converse(self, conversation: Conversation, due: float) -> None:
        while not conversation.is_over and self.tally.all.sent < self._max_requests:
            request = self._content.ask(conversation)
            attempt = Attempt(
                request, self._scenario, self.tally, start=self._start, due=due, keeps=not conversation.is_over
            )
            if not await self._run(attempt) or conversation.is_over:
                return
            answer(conversation, attempt.token_ids, "".join(attempt.text))
            due = time.monotonic() + conversation.kind.think_s.draw(conversation.rng)
            if due >= self._start + self._scenario.arrivals.duration_s:
                return
            await self._pause_until(due)

    async def _run(self, attempt: Attempt) -> bool:
        if self.num_open >= self._max_open:
            attempt.fail(GENERATOR_FULL)
            return False
        self.num_open += 1
        try:
            return await attempt.run(self._caller)
        finally:
            self.num_open -= 1
