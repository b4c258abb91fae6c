"""One call for numbers: its inputs are requests of their own, which replicas compute side by side; it ends as a whole.

    opened -> running -> over: every input has its numbers, or one of them failed and the others are cancelled

Owns what the back delivers. Everything happens on the event loop's thread. Knows neither protobuf nor text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

from octavo.v1 import types_pb2 as pb

from router.accounts import Accounts
from router.journal import Journal
from router.span import RequestSpan
from router.types import Attempt, Cancel, Request
from router.validation import Envelope
from workers.errors import CancelledRequestError, DeadlineError, OctavoError
from workers.types import Finish, TokenLogprobs

MAX_KEPT_ATTEMPTS: Final = 16
"""Of a call with thousands of inputs that are remembered after its end: each has all its candidates."""


class PoolCall:
    """`vectors[i]` is what came of input i, once `wait` has returned. `close` must follow."""

    prompt: pb.Prompt | None = None
    """Is not kept."""

    def __init__(self, envelope: Envelope, span: RequestSpan, *, model: str = "") -> None:
        self.envelope = envelope
        self.model = model
        """As the call says it; once it has begun, as it is called."""
        self.span = span
        self.error: OctavoError | None = None
        self.accounts = Accounts()
        self.journal = Journal([], num_choices=0)
        """Nothing is generated."""
        self.request: Request | None = None
        """What the back was given of the first input; None before."""
        self.has_begun = False
        """Whether the back has taken the inputs on."""
        self.num_prompt = 0
        """Tokens of all inputs."""
        self.num_used = 0
        """Tokens that its tenant has to pay for: of the inputs that were sent to a replica."""
        self.vectors: list[Sequence[float]] = []
        self._num_open = 0
        self._cancels: list[Cancel] = []
        self._over = asyncio.Event()
        timeout_s = envelope.deadline - time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._expire)

    def begin(self, requests: Sequence[Request], submit: Callable[[Request, InputSink], Cancel]) -> None:
        """Hand all requests to the back. Raises what `submit` raises; then the call has to `fail`."""
        self.vectors = [()] * len(requests)
        self.num_prompt = sum(len(request.prompt) for request in requests)
        self.request, self.model = requests[0], requests[0].model
        self._num_open = len(requests)
        self.span.accepted(requests[0])
        self.accounts.submitted_at = time.monotonic()
        for index, request in enumerate(requests):
            if self.error is not None:  # by what happened to one before
                break
            self._cancels.append(submit(request, InputSink(self, index, len(request.prompt))))
        self.has_begun = True
        self.span.begun()

    async def wait(self) -> None:
        """Raises what the call ended with, if not well."""
        await self._over.wait()
        if self.error is not None:
            raise self.error

    def fail(self, error: OctavoError) -> None:
        """End with `error` unless it has ended; what still runs is cancelled."""
        if self.error is None and not self._over.is_set():
            self.error = error.with_traceback(None)
            self._over.set()
            cancels, self._cancels = self._cancels, []
            for cancel in cancels:
                cancel()

    def close(self) -> None:
        """Nobody waits for it any more."""
        self.fail(CancelledRequestError("the client is gone"))
        self._timer.cancel()
        self.span.end(self.error, self.accounts, num_generated=0, finish_reasons=[])

    def input_ended(self, index: int, error: OctavoError | None, vector: Sequence[float]) -> None:
        """Input `index` is over."""
        if error is not None:
            self.fail(error)
            return
        self.vectors[index] = vector
        self._num_open -= 1
        if self._num_open == 0 and self.error is None:
            self.accounts.over_at = time.monotonic()
            self._cancels = []
            self._over.set()

    def _expire(self) -> None:
        after_s = self.envelope.deadline - self.envelope.accepted_at
        self.fail(DeadlineError(f"the deadline passed, {max(after_s, 0):.3f} s after the request's arrival"))


class InputSink:
    """Implements `router.types.Sink` for one input of a call."""

    __slots__ = ("_call", "_index", "_num_unpaid", "_vector")

    def __init__(self, call: PoolCall, index: int, num_tokens: int) -> None:
        self._call = call
        self._index = index
        self._num_unpaid = num_tokens
        self._vector: Sequence[float] = ()

    def dispatched(self, attempt: Attempt) -> None:
        if len(self._call.accounts.attempts) < MAX_KEPT_ATTEMPTS:
            self._call.accounts.dispatched(attempt)
        self._call.num_used += self._num_unpaid
        self._num_unpaid = 0

    def cached(self, num_tokens: int) -> None:
        """There is no cache for this."""

    def tokens(self, index: int, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        """Nothing is generated."""

    def pooled(self, index: int, values: Sequence[float]) -> None:
        self._vector = values

    def known(self, index: int) -> Sequence[int]:
        return ()

    def finished(self, index: int, finish: Finish) -> None:
        self._call.accounts.finished(finish)

    def ended(self, error: OctavoError | None) -> None:
        if error is None and not self._vector:
            error = OctavoError("the replica ended an input without numbers for it")
        self._call.input_ended(self._index, error, self._vector)
