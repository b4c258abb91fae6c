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
from router.types import Attempt, Cancel, Request
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
        "_has_tokens",
        "_is_closed",
        "_is_over",
        "_is_signalled",
        "_on_ready",
        "_owner",
        "_timer",
        "accounts",
        "envelope",
        "error",
        "has_begun",
        "journal",
        "model",
        "pending_since",
        "prompt",
        "request",
        "span",
        "window",
    )

    def __init__(
        self,
        envelope: Envelope,
        span: RequestSpan,
        owner: AnswerOwner,
        *,
        model: str = "",
        on_ready: Callable[[Answer], None],
        window: int | None = None,
    ) -> None:
        self.envelope = envelope
        self.model = model
        """As the request says it; once it has begun, as it is called."""
        self.prompt: pb.Prompt | None = None
        """Kept by who logs prompts."""
        self.span = span
        self.error: OctavoError | None = None
        self.accounts = Accounts()
        self.window = window
        """Tokens that may still be taken; None: all."""
        self.pending_since: float | None = None
        """Since when there has been something that an attached consumer did not take; on ``time.monotonic``."""
        self._owner = owner
        self._on_ready: Callable[[Answer], None] | None = on_ready
        self.request: Request | None = None
        """What the back was given; None before."""
        self.journal = Journal([], num_choices=0)
        """What was generated, received tokens included."""
        self._cancel: Cancel | None = None
        self.has_begun = False
        """Whether the back has taken the request on."""
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
        return self.journal.num_choices

    @property
    def num_prompt(self) -> int:
        return 0 if self.request is None else len(self.request.prompt)

    @property
    def num_used(self) -> int:
        """Tokens that its tenant has to pay for: none before it was sent to a replica."""
        if self.request is None or self.accounts.decision is None:
            return 0
        return len(self.request.prompt) + self.journal.num_generated - sum(map(len, self.request.received))

    def begin(self, accepted: Accepted, submit: Callable[[Request], Cancel]) -> None:
        """Hand the valid request to the back. Raises what `submit` raises; then the answer has to `fail`."""
        assert self.request is None
        assert not self.has_failed
        self.request = accepted.request
        self.model = accepted.request.model
        self.accounts.submitted_at = time.monotonic()
        self.journal = Journal(
            accepted.choices,
            num_choices=accepted.num_choices,
            num_logprobs=accepted.request.num_logprobs,
            sends_logprobs=accepted.sends_logprobs,
        )
        self.span.accepted(accepted.request)
        cancel = submit(accepted.request)
        self.has_begun = True
        self.span.begun()
        self._owner.begun(self)
        if self._is_over:
            self._owner.over(self)
            cancel()
            return
        self._cancel = cancel
        for index in self.journal.ended():  # with what was received; the engine does not know of each such end
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
        self.journal.skip()
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
            self.accounts,
            num_generated=self.journal.num_generated,
            finish_reasons=self.journal.finish_reasons,
        )
        self._owner.closed(self)

    # The consumer: a Generate call, or the Session that the request belongs to now.

    @property
    def is_complete(self) -> bool:
        """Whether the terminal is next: after an error, or when every choice's finish was taken."""
        if self.error is None and not self._is_over:
            return False
        if self.journal.has_deltas(self.window):
            return False
        return self.has_failed or self.journal.is_finish_sent

    @property
    def has_output(self) -> bool:
        """Whether `take` or the terminal would give something now."""
        return self.has_deltas or self.is_complete

    @property
    def has_deltas(self) -> bool:
        """Whether `take` would give something now."""
        return self.journal.has_deltas(self.window)

    def take(self, limit: int, add: Callable[[], pb.Delta]) -> int:
        """Fill deltas from `add`, one a choice, with what is available within the window and at most `limit`, in tokens
        (with log probabilities a token counts as several); return how much of it that is."""
        self._is_signalled = False
        num_tokens = self.journal.take(limit, self.window, add)
        if num_tokens is None:
            return 0
        if self.window is not None:
            self.window -= num_tokens
        now = time.monotonic()
        self.accounts.taken(num_tokens, now)
        self.pending_since = now if self.journal.has_deltas(None) else None
        return num_tokens * self.journal.token_weight

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
        self.accounts.num_attachments += 1
        self.journal.resume(offsets)
        self._is_signalled = False
        self.pending_since = None
        self._signal_if_output()

    def detach(self) -> None:
        """The consumer is gone; nobody is told anything until the next `attach`."""
        self._on_ready = None
        self.pending_since = None

    def offsets(self, index: int) -> range:
        """Return what an attachment may say that it has of a choice. Only once it has begun."""
        return self.journal.offsets(index)

    def fill_usage(self, usage: pb.Usage) -> None:
        self.accounts.fill_usage(usage, num_prompt=self.num_prompt, num_generated=self.journal.num_generated)

    # The back: router.types.Sink.

    def dispatched(self, attempt: Attempt) -> None:
        self.accounts.dispatched(attempt)

    def cached(self, num_tokens: int) -> None:
        self.accounts.cached(num_tokens, has_tokens=self._has_tokens)

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        if self._is_over:
            return
        if not self._has_tokens:
            self._has_tokens = True
            self.accounts.arrived()
        if self.journal.has_ended(index):
            return
        try:
            has_ended = self.journal.push(index, token_ids, logprobs)
        except OctavoError as error:
            self.fail(error)
            return
        except Exception as error:  # a sink never raises: the other requests of this message must not suffer
            self.fail(status.unexpected(error))
            return
        if has_ended:
            self._stop_choice(index)
        self._signal_if_output()

    def pooled(self, index: int, values: Sequence[float]) -> None:
        """Nothing of the kind was asked for."""

    def known(self, index: int) -> Sequence[int]:
        return self.journal.known(index)

    def finished(self, index: int, finish: Finish) -> None:
        if self._is_over or self.journal.has_ended(index):
            return
        try:
            self.journal.end(index, finish)
        except Exception as error:
            self.fail(status.unexpected(error))
            return
        self.journal.rank()
        self.accounts.finished(finish)
        self._signal_if_output()

    def ended(self, error: OctavoError | None) -> None:
        if self._is_over:
            return
        self._cancel = None
        self._set_over()
        if error is None and not self.journal.is_whole:
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
        if self.journal.is_whole:
            self.accounts.stopped()
            self.journal.rank()
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
            self.accounts.over_at = time.monotonic()
            if self.has_begun:
                self._owner.over(self)

    def _signal_if_output(self) -> None:
        if self._is_signalled or self._on_ready is None:
            return
        has_deltas = self.journal.has_deltas(None)
        if has_deltas and self.pending_since is None:
            self.pending_since = time.monotonic()
        if self.window == 0:
            has_deltas = self.journal.has_deltas(0)
        if has_deltas or self.is_complete:
            self._signal()

    def _signal(self) -> None:
        if not self._is_signalled and self._on_ready is not None:
            self._is_signalled = True
            self._on_ready(self)
