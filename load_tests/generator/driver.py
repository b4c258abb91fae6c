"""Sends one process's part of a scenario on time, reads the answers, counts what happens.

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

from octavo.client import CallError, GenerateOptions

from load_tests.generator.caller import Answer, Caller
from load_tests.generator.content import Content, Conversation, answer
from load_tests.generator.request import PlannedRequest
from load_tests.generator.scenario import Scenario
from load_tests.generator.tally import GENERATOR_FULL, NO_TERMINAL, NOT_REFUSED, NUM_INTERVALS, Group, Tally

LATE_S = 0.05
"""An answer may take this long to arrive that was made within its deadline."""
WARM_UP_S = 10.0


@dataclass(frozen=True, slots=True)
class Part:
    """Of the numbers 0, 1, 2, ... those that leave `index` when divided by `count`."""

    index: int
    count: int

    def __contains__(self, number: int) -> bool:
        return number % self.count == self.index


@dataclass(slots=True)
class _Reading:
    """An answer as far as it came. Times on the monotonic clock."""

    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0
    is_cancelled: bool = False

    @property
    def per_token_s(self) -> float:
        return (self.last - self.first) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


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

    # One conversation, one request.

    async def _converse(self, conversation: Conversation, due: float) -> None:
        while not conversation.is_over and self.tally.all.sent < self._max_requests:
            request = self._content.ask(conversation)
            said = await self._ask(request, due, keeps=not conversation.is_over)
            if said is None or conversation.is_over:
                return
            answer(conversation, *said)
            due = time.monotonic() + conversation.kind.think_s.draw(conversation.rng)
            if due >= self._start + self._scenario.arrivals.duration_s:
                return
            await self._pause_until(due)

    async def _ask(self, request: PlannedRequest, due: float, *, keeps: bool) -> tuple[list[int], str] | None:
        """Send one request and count how it ends. Return what was said, if it ended well; empty unless `keeps`."""
        tally, sent = self.tally, time.monotonic()
        groups = tally.groups(request.kind, request.tenant, due - self._start)
        for group in groups:
            group.sent += 1
        tally.lag.add(sent - due)
        if self.num_open >= self._max_open:
            self._fail(groups, GENERATOR_FULL)
            return None
        self.num_open += 1
        reading, token_ids, text = _Reading(), list[int](), list[str]()
        call: Answer | None = None
        try:
            call = self._caller.call(request)
            await self._read(call, request, reading, token_ids, text, keeps=keeps)
        except CallError as error:
            self._count_error(groups, request, reading, error)
            return None
        except asyncio.CancelledError:
            self._fail(groups, NO_TERMINAL)
            raise
        else:
            self._count_answer(groups, request, reading, due, sent)
            return token_ids, "".join(text)
        finally:
            self.num_open -= 1
            tally.last_end_s = max(tally.last_end_s, time.monotonic() - self._start)
            for group in groups:
                group.tokens += reading.num_tokens
            if call is not None:
                call.cancel()
                self._account(call)

    async def _read(
        self,
        call: Answer,
        request: PlannedRequest,
        reading: _Reading,
        token_ids: list[int],
        text: list[str],
        *,
        keeps: bool,
    ) -> None:
        tally, clock, pause_s = self.tally, self._scenario.clock, request.read_pause_s
        timer = None
        if request.cancel_after_s is not None:
            timer = asyncio.get_running_loop().call_later(request.cancel_after_s, _cancel, call, reading)
        try:
            async for piece in call:
                ids = piece.token_ids
                if keeps:
                    token_ids += ids
                    text.append(piece.text)
                if not ids:
                    continue
                now = time.monotonic()
                tally.deltas += 1
                if not reading.num_tokens:
                    reading.first = now
                elif not pause_s:
                    tally.gap.add(now - reading.last)
                reading.last = now
                reading.num_tokens += len(ids)
                if clock is not None:
                    for token_id in ids:
                        tally.age.add(clock.age_s(token_id, now))
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            if timer is not None:
                timer.cancel()

    # Counting.

    def _count_answer(
        self, groups: tuple[Group, ...], request: PlannedRequest, reading: _Reading, due: float, sent: float
    ) -> None:
        end = time.monotonic()
        if request.expected:
            self._fail(groups, f"{NOT_REFUSED}/{request.expected}")
            return
        first_token_s = (reading.first if reading.num_tokens else end) - due
        is_late = request.timeout_s is not None and end - sent > request.timeout_s + LATE_S
        is_good = not is_late and self._scenario.slo.is_met(first_token_s, reading.per_token_s, end - due)
        for group in groups:
            group.ok += 1
            group.good += is_good
            group.first_token.add(first_token_s)
            group.total.add(end - due)
        self.tally.late += is_late
        if reading.num_tokens > 1 and not request.read_pause_s:
            self.tally.per_token.add(reading.per_token_s)

    def _count_error(
        self, groups: tuple[Group, ...], request: PlannedRequest, reading: _Reading, error: CallError
    ) -> None:
        if reading.is_cancelled and error.code.name == "CANCELLED":
            for group in groups:
                group.cancelled += 1
        elif error.code.name == request.expected:
            for group in groups:
                group.refused += 1
        else:
            self._fail(groups, f"{error.code.name}/{error.reason}" if error.reason else error.code.name)

    def _fail(self, groups: tuple[Group, ...], reason: str) -> None:
        for group in groups:
            group.failed += 1
        self.tally.error(reason)

    def _account(self, call: Answer) -> None:
        usage = call.usage
        if usage is None:
            return
        self.tally.prompt_tokens += usage.prompt_tokens
        self.tally.cached_tokens += usage.cached_tokens
        share = self.tally.replica(usage.replica)
        share.requests += 1
        share.prompt_tokens += usage.prompt_tokens
        share.cached_tokens += usage.cached_tokens
        share.generated_tokens += usage.generated_tokens


def _cancel(call: Answer, reading: _Reading) -> None:
    reading.is_cancelled = True
    call.cancel()
