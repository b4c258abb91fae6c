"""What one answer tells of itself beside its tokens: where its request went, what was cached, where its time went."""

from __future__ import annotations

import time

from octavo.v1 import types_pb2 as pb

from router.types import Attempt, Decision
from workers.types import Finish


class Accounts:
    """Filled in by what the back says and by what is taken, on ``time.monotonic``."""

    __slots__ = (
        "attempts",
        "decode_s",
        "engine_queue_s",
        "first_taken_at",
        "first_token_at",
        "has_finish",
        "num_attachments",
        "num_cached",
        "num_messages",
        "num_preemptions",
        "num_steps",
        "num_taken",
        "over_at",
        "prefill_s",
        "submitted_at",
        "taken_at",
    )

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.num_cached = 0
        """Prompt tokens."""
        self.submitted_at: float | None = None
        """When the request was valid and went to the back."""
        self.first_token_at: float | None = None
        self.over_at: float | None = None
        """When the back owed nothing more."""
        self.has_finish = False
        """Whether the engine has told the following three, or the router found out as much as it could."""
        self.engine_queue_s = self.prefill_s = self.decode_s = 0.0
        """In the last replica, of the choice that took longest."""
        self.num_preemptions = self.num_steps = 0
        """In the last replica: of all choices; of the one that had most."""
        self.num_messages = self.num_taken = 0
        """To the client: messages with tokens, and the tokens in them."""
        self.first_taken_at: float | None = None
        self.taken_at: float | None = None
        """When the first and the last of these went."""
        self.num_attachments = 0
        """How often its client came back for it over another stream."""

    @property
    def decision(self) -> Decision | None:
        """Where it went last, and why; None: nowhere."""
        return self.attempts[-1].decision if self.attempts else None

    def dispatched(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)

    def cached(self, num_tokens: int, *, has_tokens: bool) -> None:
        """A replica has so many tokens; one after the first counts what it knows of the answer, too."""
        if self.attempts:
            self.attempts[-1].num_cached = num_tokens
        if not has_tokens:
            self.num_cached = num_tokens

    def arrived(self) -> None:
        """The first tokens are there."""
        self.first_token_at = time.monotonic()

    def finished(self, finish: Finish) -> None:
        """The engine has ended a choice; the one that took longest tells the times."""
        self.has_finish = True
        self.engine_queue_s = max(self.engine_queue_s, finish.queue_s)
        self.prefill_s = max(self.prefill_s, finish.prefill_s)
        self.decode_s = max(self.decode_s, finish.decode_s)
        self.num_preemptions += finish.num_preemptions
        self.num_steps = max(self.num_steps, finish.num_steps)

    def stopped(self) -> None:
        """The router ends the engine's work, so that the engine will not tell its times."""
        first_token_at = self.first_token_at or 0.0
        if not self.prefill_s:
            self.prefill_s = max(0.0, first_token_at - self.attempts[-1].sent_at) if self.attempts else 0.0
        self.decode_s = max(self.decode_s, time.monotonic() - first_token_at)

    def taken(self, num_tokens: int, now: float) -> None:
        """A message to the client has so many tokens."""
        self.num_messages += 1
        self.num_taken += num_tokens
        self.taken_at = now
        if self.first_taken_at is None:
            self.first_taken_at = now

    def fill_usage(self, usage: pb.Usage, *, num_prompt: int, num_generated: int) -> None:
        usage.prompt_tokens = num_prompt
        usage.cached_tokens = self.num_cached
        usage.generated_tokens = num_generated
        usage.queue_s = (self.attempts[-1].queue_s if self.attempts else 0.0) + self.engine_queue_s
        usage.prefill_s = self.prefill_s
        usage.decode_s = self.decode_s
        usage.replica = self.replica

    @property
    def replica(self) -> str:
        """Where the request went last; empty if it went nowhere."""
        return self.attempts[-1].decision.replica if self.attempts else ""

    def fill_decision(self, message: pb.Decision) -> None:
        """Only once it was dispatched."""
        fill_decision(message, self.attempts[-1].decision)


def fill_decision(message: pb.Decision, decision: Decision) -> None:
    message.replica = decision.replica
    message.rule = decision.rule
    message.matched_tokens = decision.matched_tokens
    message.attempt = decision.attempt
    for candidate in decision.candidates:
        message.candidates.add(
            replica=candidate.replica,
            matched_tokens=candidate.matched_tokens,
            owed_tokens=candidate.owed_tokens,
            uncached_tokens=candidate.uncached_tokens,
            decode_tokens=candidate.decode_tokens,
            displaced_tokens=candidate.displaced_tokens,
            recent_tokens=candidate.recent_tokens,
            cost=candidate.cost,
        )
