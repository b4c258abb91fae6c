"""One request's answer: what the back delivers, kept until the client has it.

An `Answer` is the back's `Sink` and the source that a Generate call or a Session takes `Delta` messages from. It keeps
a journal of each choice since its beginning (`router/choice.py`, bounded by max_tokens), so that a client that attaches
again gets the rest from wherever it was, always cut between tokens. With best_of it is known when all have ended which
of the generated choices are the answer, and in which order; until then there is nothing to take. Its life:

    opened --begin--> running --over--> complete --close--> closed
       └──────── fail: refused, cancelled, deadline, slow consumer ───┘

`over`: the back owes nothing more. `complete`: its one terminal may be sent now. `close`: it was sent, or nobody is
left to send it to. Everything happens on the event loop's thread. Knows no streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from octavo.v1 import types_pb2 as pb

from router import status
from router.choice import Choice
from router.span import RequestSpan
from router.types import Cancel, Decision, Request
from router.validation import Accepted, Envelope
from workers.errors import CancelledRequestError, DeadlineError, OctavoError
from workers.types import Finish, TokenLogprobs

LOGPROBS_PER_TOKEN = 6
"""So many log probabilities take the room of a token, in a message."""


class AnswerOwner(Protocol):
    """Who keeps count of answers. Each of these is called at most once for one answer."""

    def begun(self, answer: Answer) -> None:
        """The back has taken the request on."""

    def over(self, answer: Answer) -> None:
        """The back, which had taken it on, owes nothing more."""

    def closed(self, answer: Answer) -> None:
        """Nothing more happens to this answer."""


class Answer:
    """`on_ready(answer)` is called when there is something to take that was not there at the last `take`."""

    __slots__ = (
        "_cancel",
        "_choices",
        "_decode_s",
        "_dispatch_queue_s",
        "_dispatched_at",
        "_engine_queue_s",
        "_first_token_at",
        "_generated",
        "_has_begun",
        "_is_closed",
        "_is_over",
        "_is_signalled",
        "_num_choices",
        "_on_ready",
        "_owner",
        "_prefill_s",
        "_request",
        "_sends_logprobs",
        "_timer",
        "_token_weight",
        "decision",
        "envelope",
        "error",
        "num_cached",
        "pending_since",
        "span",
        "window",
    )

    def __init__(
        self,
        envelope: Envelope,
        span: RequestSpan,
        owner: AnswerOwner,
        *,
        on_ready: Callable[[Answer], None],
        window: int | None = None,
    ) -> None:
        self.envelope = envelope
        self.span = span
        self.error: OctavoError | None = None
        self.decision: Decision | None = None
        self.num_cached = 0
        self.window = window
        """Tokens that may still be taken; None: all."""
        self.pending_since: float | None = None
        """Since when there has been something that an attached consumer did not take; on ``time.monotonic``."""
        self._owner = owner
        self._on_ready: Callable[[Answer], None] | None = on_ready
        self._request: Request | None = None
        self._generated: list[Choice] = []
        self._choices: list[Choice] = []
        """The answer: what is generated, or the best of it."""
        self._num_choices = 0
        self._sends_logprobs = False
        self._token_weight = 1
        self._cancel: Cancel | None = None
        self._has_begun = False
        self._is_over = False
        self._is_closed = False
        self._is_signalled = False
        self._dispatched_at = self._first_token_at = 0.0
        self._dispatch_queue_s = self._engine_queue_s = self._prefill_s = self._decode_s = 0.0
        timeout_s = envelope.deadline - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    # What the front does with it.

    @property
    def request_id(self) -> str:
        return self.envelope.request_id

    @property
    def has_failed(self) -> bool:
        return self.error is not None

    @property
    def is_closed(self) -> bool:
        return self._is_closed

    @property
    def num_choices(self) -> int:
        """0 before it has begun."""
        return self._num_choices

    def begin(self, accepted: Accepted, submit: Callable[[Request], Cancel]) -> None:
        """Hand the valid request to the back. Raises what `submit` raises; then the answer has to `fail`."""
        assert self._request is None
        assert not self.has_failed
        self._request = accepted.request
        self._generated = accepted.choices
        self._num_choices = accepted.num_choices
        if accepted.num_choices == len(self._generated):
            self._choices = self._generated
        if accepted.sends_logprobs:
            self._sends_logprobs = True
            self._token_weight = 1 + (1 + (accepted.request.num_logprobs or 0)) // LOGPROBS_PER_TOKEN
        self.span.accepted(accepted.request)
        cancel = submit(accepted.request)
        self._has_begun = True
        self._owner.begun(self)
        if self._is_over:
            self._owner.over(self)
            cancel()
            return
        self._cancel = cancel
        for index, choice in enumerate(self._generated):
            if choice.finish is not None:  # in what was received, and the engine does not know of each such end
                cancel(index)
        self._signal_if_output()

    def fail(self, error: OctavoError) -> None:
        """End with `error` unless the terminal was sent or an error came before; the engine's work ends with it."""
        if self.has_failed or self._is_closed:
            return
        self.error = error
        self._stop_work()
        self._signal()

    def cancel(self) -> None:
        """The consumer wants nothing more but the terminal: of an answer that was closed, the one that it had."""
        if not self._is_closed:
            self.fail(CancelledRequestError("cancelled by the client"))
            return
        for choice in self._choices:
            choice.skip()
        self._signal()

    def close(self) -> None:
        """The terminal was sent, or nobody waits for it any more; work that still runs is cancelled. Idempotent."""
        if self._is_closed:
            return
        if not self.is_complete:
            self.fail(CancelledRequestError("the client is gone"))
        self._is_closed = True
        self._on_ready = None
        self._timer.cancel()
        self.span.end(
            self.error,
            num_generated=self.num_generated,
            num_cached=self.num_cached,
            finish_reasons=[_reason_name(choice.finish) for choice in self._choices if choice.finish is not None],
            decision=self.decision,
        )
        self._owner.closed(self)

    # The consumer: a Generate call, or the Session that the request belongs to now.

    @property
    def is_complete(self) -> bool:
        """Whether the terminal is next: after an error, or when every choice's finish was taken."""
        if self.error is None and not self._is_over:
            return False
        if self._has_deltas(self.window):
            return False
        return self.has_failed or all(choice.is_finish_sent for choice in self._choices)

    @property
    def has_output(self) -> bool:
        """Whether `take` or the terminal would give something now."""
        return self.is_complete or self._has_deltas(self.window)

    def take(self, limit: int, add: Callable[[], pb.Delta]) -> int:
        """Fill deltas from `add`, one a choice, with what is available within the window and at most `limit`, in tokens
        (with log probabilities a token counts as several); return how much of it that is. (Filled in place: to make
        messages and copy them costs three times as much.)"""
        self._is_signalled = False
        weight = self._token_weight
        left = limit // weight
        has_taken = False
        for index, choice in self._in_turn():
            num_tokens = choice.take(index, left if self.window is None else min(left, self.window), add)
            if num_tokens is None:
                continue
            has_taken = True
            left -= num_tokens
            if self.window is not None:
                self.window -= num_tokens
        if has_taken:
            self.pending_since = time.monotonic() if self._has_deltas(None) else None
        return (limit // weight - left) * weight

    def _in_turn(self) -> Iterable[tuple[int, Choice]]:
        """Return the choices with their indices; where a window may not let all through, the one that is furthest
        behind first, so that none waits for the end of another."""
        if self.window is None or len(self._choices) == 1:
            return enumerate(self._choices)
        return sorted(enumerate(self._choices), key=lambda each: each[1].num_sent)

    def grant(self, num_tokens: int) -> None:
        """Widen the window; without one there is nothing to widen."""
        if self.window is not None:
            self.window += num_tokens
            self._signal_if_output()

    def attach(self, on_ready: Callable[[Answer], None], *, window: int | None, offsets: Sequence[int]) -> None:
        """A consumer takes over that has the first ``offsets[i]`` tokens of choice i. Also after `close`: the terminal
        may have been lost on its way, and is told again."""
        self._on_ready = on_ready
        self.window = window
        for choice, offset in zip(self._choices, offsets, strict=False):
            choice.resume(offset)
        self._is_signalled = False
        self.pending_since = None
        self._signal_if_output()

    def detach(self) -> None:
        """The consumer is gone; nobody is told anything until the next `attach`."""
        self._on_ready = None
        self.pending_since = None

    def offsets(self, index: int) -> range:
        """Return what an attachment may say that it has of a choice: from the tokens that the client received before
        this request to all there are. Only once it has begun."""
        if not self._choices:
            return range(1)
        choice = self._choices[index]
        return range(choice.num_received, len(choice.token_ids) + 1)

    @property
    def num_generated(self) -> int:
        return sum(len(choice.token_ids) for choice in self._generated)

    def usage(self) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=0 if self._request is None else len(self._request.prompt),
            cached_tokens=self.num_cached,
            generated_tokens=self.num_generated,
            queue_s=self._dispatch_queue_s + self._engine_queue_s,
            prefill_s=self._prefill_s,
            decode_s=self._decode_s,
            replica="" if self.decision is None else self.decision.replica,
        )

    # The back: router.types.Sink.

    def dispatched(self, decision: Decision, queue_s: float) -> None:
        self.decision = decision
        self._dispatch_queue_s = queue_s
        self._dispatched_at = time.monotonic()

    def cached(self, num_tokens: int) -> None:
        self.num_cached = num_tokens

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        if self._is_over:
            return
        assert self._request is not None
        if not self._first_token_at:
            self._first_token_at = time.monotonic()
        choice = self._generated[index]
        if choice.finish is not None:
            return
        try:
            num_taken = choice.push(token_ids)
            if self._request.num_logprobs is not None:
                assert len(logprobs) == len(token_ids), "each token has its log probability"
                choice.note_logprobs(logprobs[:num_taken], keeps=self._sends_logprobs)
        except Exception as error:  # a sink never raises: the other requests of this message must not suffer
            self.fail(status.unexpected(error))
            return
        if choice.finish is not None:
            self._stop_choice(index)
        self._signal_if_output()

    def finished(self, index: int, finish: Finish) -> None:
        if self._is_over or self._generated[index].finish is not None:
            return
        try:
            self._generated[index].end(finish)
        except Exception as error:
            self.fail(status.unexpected(error))
            return
        self._rank_if_whole()
        self._engine_queue_s = max(self._engine_queue_s, finish.queue_s)
        self._prefill_s = max(self._prefill_s, finish.prefill_s)
        self._decode_s = max(self._decode_s, finish.decode_s)
        self._signal_if_output()

    def ended(self, error: OctavoError | None) -> None:
        if self._is_over:
            return
        self._cancel = None
        self._set_over()
        if error is None and any(choice.finish is None for choice in self._generated):
            error = status.unexpected(RuntimeError("the back ended a request without a finish for each choice"))
        if error is not None:
            self.fail(error)
        else:
            self._signal_if_output()

    def _expire(self) -> None:
        after_s = self.envelope.deadline - self.envelope.accepted_at
        self.fail(DeadlineError(f"the deadline passed, {max(after_s, 0):.3f} s after the request's arrival"))

    def _stop_choice(self, index: int) -> None:
        """A stop string has ended a choice, of which the engine does not know: end it there, or all of the work."""
        if all(choice.finish is not None for choice in self._generated):
            self._measure()
            self._rank_if_whole()
            self._stop_work()
        elif self._cancel is not None:
            self._cancel(index)

    def _rank_if_whole(self) -> None:
        """With best_of: once all have ended, the best are the answer."""
        if not self._choices and all(choice.finish is not None for choice in self._generated):
            ranked = sorted(self._generated, key=lambda choice: -choice.sum_logprobs)
            self._choices = ranked[: self._num_choices]

    def _measure(self) -> None:
        """Fill in times that the engine will not tell, because the router ends its work."""
        if not self._prefill_s:
            self._prefill_s = max(0.0, self._first_token_at - self._dispatched_at)
        self._decode_s = max(self._decode_s, time.monotonic() - self._first_token_at)

    def _stop_work(self) -> None:
        """Cancel what the back still does; it calls `ended` before this returns, which then means nothing."""
        cancel, self._cancel = self._cancel, None
        self._set_over()
        if cancel is not None:
            cancel()

    def _set_over(self) -> None:
        if not self._is_over:
            self._is_over = True
            if self._has_begun:
                self._owner.over(self)

    def _has_deltas(self, window: int | None) -> bool:
        for choice in self._choices:
            if choice.num_sent < len(choice.token_ids):
                if window is None or window > 0:
                    return True
            elif choice.finish is not None and not choice.is_finish_sent:
                return True
        return False

    def _signal_if_output(self) -> None:
        if self._is_signalled or self._on_ready is None:
            return
        if self.pending_since is None and self._has_deltas(None):
            self.pending_since = time.monotonic()
        if self.has_output:
            self._signal()

    def _signal(self) -> None:
        if not self._is_signalled and self._on_ready is not None:
            self._is_signalled = True
            self._on_ready(self)


def decision_message(decision: Decision) -> pb.Decision:
    return pb.Decision(
        replica=decision.replica,
        rule=decision.rule,
        matched_tokens=decision.matched_tokens,
        attempt=decision.attempt,
        candidates=[
            pb.Decision.Candidate(
                replica=candidate.replica,
                matched_tokens=candidate.matched_tokens,
                owed_tokens=candidate.owed_tokens,
                uncached_tokens=candidate.uncached_tokens,
                decode_tokens=candidate.decode_tokens,
                cost=candidate.cost,
            )
            for candidate in decision.candidates
        ],
    )


def _reason_name(finish: pb.Finish) -> str:
    return "length" if finish.reason == pb.FINISH_REASON_LENGTH else "stop"
