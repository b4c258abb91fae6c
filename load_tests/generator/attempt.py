"""One request on its way: sent, read, perhaps cancelled, and counted in exactly one way.

Its times count from `due`, when it should have been sent, not from when it was. What one of a conversation said is kept
for the next turn. Knows no schedule and no other request.
"""

from __future__ import annotations

import asyncio
import time

from octavo.client import CallError

from load_tests.generator.caller import Answer, Caller
from load_tests.generator.request import PlannedRequest
from load_tests.generator.scenario import Scenario
from load_tests.generator.tally import NO_TERMINAL, NOT_REFUSED, Tally

LATE_S = 0.25
"""How long an answer that was made within its deadline may take to be read: way, loops, scheduling of this machine."""


class Attempt:
    """`start` and `due` are on the monotonic clock; `keeps`: whether what is said is needed afterwards."""

    def __init__(
        self,
        request: PlannedRequest,
        scenario: Scenario,
        tally: Tally,
        *,
        start: float,
        due: float,
        keeps: bool = False,
    ) -> None:
        self.token_ids: list[int] = []
        self.text: list[str] = []
        """What was said, if it `keeps`."""
        self._request = request
        self._slo = scenario.slo
        self._clock = scenario.clock
        self._tally = tally
        self._start = start
        self._due = due
        self._keeps = keeps
        self._sent = time.monotonic()
        self._first = self._last = 0.0
        self._num_tokens = 0
        self._is_cancelled = False
        self._groups = tally.groups(request.kind, request.tenant, due - start)
        for group in self._groups:
            group.sent += 1
        tally.lag.add(self._sent - due)

    async def run(self, caller: Caller) -> bool:
        """Send it and read the answer; return whether that came to its end. Cancelled, it counts as without an end."""
        call: Answer | None = None
        try:
            call = caller.call(self._request)
            await self._read(call)
        except CallError as error:
            self._count_error(error)
            return False
        except asyncio.CancelledError:
            self.fail(NO_TERMINAL)
            raise
        else:
            return self._count_answer(call)
        finally:
            self._tally.last_end_s = max(self._tally.last_end_s, time.monotonic() - self._start)
            for group in self._groups:
                group.tokens += self._num_tokens
            if call is not None:
                call.cancel()
                self._account(call)

    def fail(self, reason: str) -> None:
        """Count it as failed."""
        for group in self._groups:
            group.failed += 1
        self._tally.error(reason)

    async def _read(self, call: Answer) -> None:
        after_s, pause_s = self._request.cancel_after_s, self._request.read_pause_s
        timer = None if after_s is None else asyncio.get_running_loop().call_later(after_s, self._cancel, call)
        try:
            async for piece in call:
                ids = piece.token_ids
                if self._keeps:
                    self.token_ids += ids
                    self.text.append(piece.text)
                if not ids:
                    continue
                now = time.monotonic()
                if not self._num_tokens:
                    self._first = now
                elif not pause_s:
                    self._tally.gap.add(now - self._last)
                self._last = now
                self._num_tokens += len(ids)
                self._tally.arrive(len(ids), now - self._start)
                if self._clock is not None:
                    for token_id in ids:
                        self._tally.age.add(self._clock.age_s(token_id, now))
                if pause_s:
                    await asyncio.sleep(pause_s)
        finally:
            if timer is not None:
                timer.cancel()

    def _cancel(self, call: Answer) -> None:
        self._is_cancelled = True
        call.cancel()

    # Counting.

    def _count_answer(self, call: Answer) -> bool:
        if self._request.expected:
            self.fail(f"{NOT_REFUSED}/{self._request.expected}")
            return False
        end = time.monotonic()
        is_late = self._is_late(call, end)
        first_token_s = (self._first if self._num_tokens else end) - self._due
        per_token_s = (self._last - self._first) / (self._num_tokens - 1) if self._num_tokens > 1 else 0.0
        is_good = not is_late and self._slo.is_met(first_token_s, per_token_s, end - self._due)
        for group in self._groups:
            group.ok += 1
            group.good += is_good
            group.first_token.add(first_token_s)
            group.total.add(end - self._due)
        self._tally.late += is_late
        if call.usage is not None:
            self._tally.queue.add(call.usage.queue_s)
        if self._num_tokens > 1 and not self._request.read_pause_s:
            self._tally.per_token.add(per_token_s)
        return True

    def _is_late(self, call: Answer, end: float) -> bool:
        """Say whether the end came after the deadline: by the answer's own accounts, or by ours beyond all doubt."""
        timeout_s, usage = self._request.timeout_s, call.usage
        if timeout_s is None:
            return False
        own_s = usage.queue_s + usage.prefill_s + usage.decode_s if usage is not None else 0.0
        return own_s > timeout_s or end - self._sent > timeout_s + LATE_S

    def _count_error(self, error: CallError) -> None:
        code = error.code.name
        if self._is_cancelled and code == "CANCELLED":
            for group in self._groups:
                group.cancelled += 1
        elif code == self._request.expected:
            for group in self._groups:
                group.refused += 1
        else:
            self.fail(f"{code}/{error.reason}" if error.reason else code)

    def _account(self, call: Answer) -> None:
        usage, tally = call.usage, self._tally
        if usage is None or not usage.replica:  # it never reached one
            return
        tally.prompt_tokens += usage.prompt_tokens
        tally.cached_tokens += usage.cached_tokens
        share = tally.replica(usage.replica)
        share.requests += 1
        share.prompt_tokens += usage.prompt_tokens
        share.cached_tokens += usage.cached_tokens
        share.generated_tokens += usage.generated_tokens
