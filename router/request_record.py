"""What a router can tell of one request: references to what is there anyway, and nothing that has to be put into words.

Made once, when the request ends, or when somebody asks for one that has not. Has neither the prompt nor the answer, and
of what a client may write at any length the beginning.
"""

from __future__ import annotations

import time
from typing import Final, Protocol

from octavo.v1 import types_pb2 as pb

from router.accounts import Accounts
from router.journal import Journal
from router.span import RequestSpan
from router.types import Attempt, Request
from router.validation import Envelope
from workers.errors import OctavoError

MAX_NAME: Final = 128
"""Characters of an id or a model's name that nobody has checked."""
MAX_MESSAGE: Final = 500


class Recorded(Protocol):
    """What is told of: an `Answer`, or a `PoolCall`."""

    envelope: Envelope
    model: str
    prompt: pb.Prompt | None
    span: RequestSpan
    error: OctavoError | None
    accounts: Accounts
    request: Request | None
    journal: Journal
    has_begun: bool

    @property
    def num_prompt(self) -> int:
        """Tokens that the request gave."""


class RequestRecord:
    """`now` is on ``time.monotonic``, as all its times are."""

    __slots__ = (
        "accepted_at",
        "accounts",
        "code",
        "deadline",
        "ended_at",
        "finish_reasons",
        "has_begun",
        "has_own_deadline",
        "is_ended",
        "is_pool",
        "is_session",
        "max_tokens",
        "message",
        "model",
        "num_choices",
        "num_generated",
        "num_prompt",
        "num_received",
        "operation",
        "priority",
        "reason",
        "request_id",
        "tenant",
        "traceparent",
        "unix_time",
    )

    def __init__(self, answer: Recorded, now: float, *, is_ended: bool = True) -> None:
        request, error, envelope = answer.request, answer.error, answer.envelope
        self.request_id = envelope.request_id[:MAX_NAME]
        self.tenant = envelope.identity.tenant
        self.accepted_at, self.deadline = envelope.accepted_at, envelope.deadline
        self.has_own_deadline, self.is_session = envelope.has_own_deadline, envelope.is_session
        self.accounts = answer.accounts
        self.model = answer.model[:MAX_NAME]
        """As the client says it, if it did not begin: anything."""
        self.traceparent = answer.span.traceparent
        self.has_begun = answer.has_begun
        self.is_ended = is_ended
        self.ended_at = now
        """Or, if it has not ended, when this was made."""
        self.unix_time = time.time()
        """The same, in seconds since 1970."""
        self.num_generated = answer.journal.num_generated
        self.finish_reasons = answer.journal.finish_reasons
        self.operation = answer.span.operation
        self.num_prompt = answer.num_prompt
        self.is_pool = request is not None and request.pool is not None
        """Whether numbers were asked for, of inputs that go side by side."""
        self.num_received = self.max_tokens = self.num_choices = self.priority = 0
        if request is not None:
            self.max_tokens = request.max_tokens
            self.num_received = sum(map(len, request.received)) if request.received else 0
            self.num_choices, self.priority = request.n, request.priority
            if self.is_pool:  # nothing is generated
                self.max_tokens = self.num_choices = 0
        # Not the error itself, which may know the frames that it was raised in.
        self.code, self.reason, self.message = "OK", "", ""
        if error is not None:
            self.code, self.reason, self.message = error.code, error.reason, str(error)[:MAX_MESSAGE]

    @property
    def trace_id(self) -> str:
        """32 hexadecimal digits, or nothing."""
        return self.traceparent[3:35]

    @property
    def attempts(self) -> list[Attempt]:
        return self.accounts.attempts

    @property
    def duration_s(self) -> float:
        return self.ended_at - self.accepted_at

    @property
    def queue_s(self) -> float:
        """All waits in the queue together, of those that ended with a replica; of inputs side by side the longest."""
        waits = [attempt.wait.duration_s for attempt in self.accounts.attempts]
        return max(waits, default=0.0) if self.is_pool else sum(waits)

    @property
    def first_token_s(self) -> float | None:
        """From the arrival to the first token; None without one."""
        at = self.accounts.first_token_at
        return None if at is None else at - self.accepted_at

    @property
    def token_s(self) -> float | None:
        """The mean time from a token to the next one of its choice; None where there is no next one."""
        accounts = self.accounts
        if accounts.first_token_at is None or accounts.over_at is None:
            return None
        num_tokens = (self.num_generated - self.num_received) / self.num_choices
        return (accounts.over_at - accounts.first_token_at) / (num_tokens - 1) if num_tokens > 1 else None
