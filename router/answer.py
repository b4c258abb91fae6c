"""One request's answer: what the back delivers, kept until the client has it.

An `Answer` is the back's `Sink` and the source that a Generate call or a Session takes `Delta` messages from. What was
generated is in its `Journal`, what else there is to tell in its `Accounts`. Its life:

    opened --begin--> running --over--> complete --close--> closed
       └──────── fail: refused, cancelled, deadline, slow consumer ───┘

`over`: the back owes nothing more. `complete`: its one terminal may be sent now. `close`: it was sent, or nobody is
left to send it to. Everything happens on the event loop's thread. Knows no streams.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from octavo.v1 import types_pb2 as pb

from router import status
from router.accounts import Accounts
from router.journal import Journal
from router.span import RequestSpan
from router.types import Cancel, Decision, Request
from router.validation import Accepted, Envelope
from workers.errors import CancelledRequestError, DeadlineError, OctavoError
from workers.types import Finish, TokenLogprobs

MAX_MESSAGE_TOKENS = 32_768
"""In one message to a client, which keeps it far below the usual limit of 4 MiB."""


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
        "_has_begun",
        "_has_tokens",
        "_is_closed",
        "_is_over",
        "_is_signalled",
        "_journal",
        "_on_ready",
        "_owner",
        "_request",
        "_timer",
        "accounts",
        "envelope",
        "error",
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
        self.accounts = Accounts()
        self.window = window
        """Tokens that may still be taken; None: all."""
        self.pending_since: float | None = None
        """Since when there has been something that an attached consumer did not take; on ``time.monotonic``."""
        self._owner = owner
        self._on_ready: Callable[[Answer], None] | None = on_ready
        self._request: Request | None = None
        self._journal = Journal([], num_choices=0)
        self._cancel: Cancel | None = None
        self._has_begun = False
        self._has_tokens = False
        self._is_over = False
        self._is_closed = False
        self._is_signalled = False
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
    def num_choices(self) -> int:
        """0 before it has begun."""
        return self._journal.num_choices

    @property
    def num_used(self) -> int:
        """Tokens that its tenant has to pay for: none before it was sent to a replica."""
        if self._request is None or self.accounts.decision is None:
            return 0
        return len(self._request.prompt) + self._journal.num_generated - sum(map(len, self._request.received))

    def begin(self, accepted: Accepted, submit: Callable[[Request], Cancel]) -> None:
        """Hand the valid request to the back. Raises what `submit` raises; then the answer has to `fail`."""
        assert self._request is None
        assert not self.has_failed
        self._request = accepted.request
        self._journal = Journal(
            accepted.choices,
            num_choices=accepted.num_choices,
            num_logprobs=accepted.request.num_logprobs,
            sends_logprobs=accepted.sends_logprobs,
        )
        self.span.accepted(accepted.request)
        cancel = submit(accepted.request)
        self._has_begun = True
        self._owner.begun(self)
        if self._is_over:
            self._owner.over(self)
            cancel()
            return
        self._cancel = cancel
        for index in self._journal.ended():  # with what was received; the engine does not know of each such end
            cancel(index)
        self._signal_if_output()

    def fail(self, error: OctavoError) -> None:
        """End with `error` unless the terminal was sent or an error came before; the engine's work ends with it."""
        if self.has_failed or self._is_closed:
            return
        # Its traceback has the frames that know this answer: a cycle, which would live until garbage is searched for.
        self.error = error.with_traceback(None)
        self._stop_work()
        self._signal()

    def cancel(self) -> None:
        """The consumer wants nothing more but the terminal: of an answer that was closed, the one that it had."""
        if not self._is_closed:
            self.fail(CancelledRequestError("cancelled by the client"))
            return
        self._journal.skip()
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
            num_generated=self._journal.num_generated,
            num_cached=self.accounts.num_cached,
            finish_reasons=self._journal.finish_reasons,
            decision=self.accounts.decision,
        )
        self._owner.closed(self)

    # The consumer: a Generate call, or the Session that the request belongs to now.

    @property
    def is_complete(self) -> bool:
        """Whether the terminal is next: after an error, or when every choice's finish was taken."""
        if self.error is None and not self._is_over:
            return False
        if self._journal.has_deltas(self.window):
            return False
        return self.has_failed or self._journal.is_finish_sent

    @property
    def has_output(self) -> bool:
        """Whether `take` or the terminal would give something now."""
        return self.has_deltas or self.is_complete

    @property
    def has_deltas(self) -> bool:
        """Whether `take` would give something now."""
        return self._journal.has_deltas(self.window)

    def take(self, limit: int, add: Callable[[], pb.Delta]) -> int:
        """Fill deltas from `add`, one a choice, with what is available within the window and at most `limit`, in tokens
        (with log probabilities a token counts as several); return how much of it that is."""
        self._is_signalled = False
        num_tokens = self._journal.take(limit, self.window, add)
        if num_tokens is None:
            return 0
        if self.window is not None:
            self.window -= num_tokens
        self.pending_since = time.monotonic() if self._journal.has_deltas(None) else None
        return num_tokens * self._journal.token_weight

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
        self._journal.resume(offsets)
        self._is_signalled = False
        self.pending_since = None
        self._signal_if_output()

    def detach(self) -> None:
        """The consumer is gone; nobody is told anything until the next `attach`."""
        self._on_ready = None
        self.pending_since = None

    def offsets(self, index: int) -> range:
        """Return what an attachment may say that it has of a choice. Only once it has begun."""
        return self._journal.offsets(index)

    def fill_usage(self, usage: pb.Usage) -> None:
        self.accounts.fill_usage(
            usage,
            num_prompt=0 if self._request is None else len(self._request.prompt),
            num_generated=self._journal.num_generated,
        )

    # The back: router.types.Sink.

    def dispatched(self, decision: Decision, queue_s: float) -> None:
        self.accounts.dispatched(decision, queue_s)

    def cached(self, num_tokens: int) -> None:
        if not self._has_tokens:  # a later replica counts what it knows of the answer, too
            self.accounts.num_cached = num_tokens

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        if self._is_over:
            return
        if not self._has_tokens:
            self._has_tokens = True
            self.accounts.arrived()
        if self._journal.has_ended(index):
            return
        try:
            has_ended = self._journal.push(index, token_ids, logprobs)
        except OctavoError as error:
            self.fail(error)
            return
        except Exception as error:  # a sink never raises: the other requests of this message must not suffer
            self.fail(status.unexpected(error))
            return
        if has_ended:
            self._stop_choice(index)
        self._signal_if_output()

    def known(self, index: int) -> Sequence[int]:
        return self._journal.known(index)

    def finished(self, index: int, finish: Finish) -> None:
        if self._is_over or self._journal.has_ended(index):
            return
        try:
            self._journal.end(index, finish)
        except Exception as error:
            self.fail(status.unexpected(error))
            return
        self._journal.rank()
        self.accounts.finished(finish)
        self._signal_if_output()

    def ended(self, error: OctavoError | None) -> None:
        if self._is_over:
            return
        self._cancel = None
        self._set_over()
        if error is None and not self._journal.is_whole:
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
        if self._journal.is_whole:
            self.accounts.stopped()
            self._journal.rank()
            self._stop_work()
        elif self._cancel is not None:
            self._cancel(index)

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

    def _signal_if_output(self) -> None:
        if self._is_signalled or self._on_ready is None:
            return
        has_deltas = self._journal.has_deltas(None)
        if has_deltas and self.pending_since is None:
            self.pending_since = time.monotonic()
        if self.window == 0:
            has_deltas = self._journal.has_deltas(0)
        if has_deltas or self.is_complete:
            self._signal()

    def _signal(self) -> None:
        if not self._is_signalled and self._on_ready is not None:
            self._is_signalled = True
            self._on_ready(self)
