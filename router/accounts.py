"""What one answer tells of itself beside its tokens: where its request went, what was cached, where its time went."""

from __future__ import annotations

import time

from octavo.v1 import types_pb2 as pb

from router.types import Decision
from workers.types import Finish


class Accounts:
    """Filled in by what the back says, on ``time.monotonic``."""

    __slots__ = (
        "_decode_s",
        "_dispatch_queue_s",
        "_dispatched_at",
        "_engine_queue_s",
        "_first_token_at",
        "_prefill_s",
        "decision",
        "num_cached",
    )

    def __init__(self) -> None:
        self.decision: Decision | None = None
        self.num_cached = 0
        """Prompt tokens."""
        self._dispatched_at = self._first_token_at = 0.0
        self._dispatch_queue_s = self._engine_queue_s = self._prefill_s = self._decode_s = 0.0

    def dispatched(self, decision: Decision, queue_s: float) -> None:
        self.decision = decision
        self._dispatch_queue_s = queue_s
        self._dispatched_at = time.monotonic()

    def arrived(self) -> None:
        """The first tokens are there."""
        self._first_token_at = time.monotonic()

    def finished(self, finish: Finish) -> None:
        """The engine has ended a choice; the one that took longest tells the times."""
        self._engine_queue_s = max(self._engine_queue_s, finish.queue_s)
        self._prefill_s = max(self._prefill_s, finish.prefill_s)
        self._decode_s = max(self._decode_s, finish.decode_s)

    def stopped(self) -> None:
        """The router ends the engine's work, so that the engine will not tell its times."""
        if not self._prefill_s:
            self._prefill_s = max(0.0, self._first_token_at - self._dispatched_at)
        self._decode_s = max(self._decode_s, time.monotonic() - self._first_token_at)

    def fill_usage(self, usage: pb.Usage, *, num_prompt: int, num_generated: int) -> None:
        usage.prompt_tokens = num_prompt
        usage.cached_tokens = self.num_cached
        usage.generated_tokens = num_generated
        usage.queue_s = self._dispatch_queue_s + self._engine_queue_s
        usage.prefill_s = self._prefill_s
        usage.decode_s = self._decode_s
        usage.replica = self.replica

    @property
    def replica(self) -> str:
        """Where the request went last; empty if it went nowhere."""
        return "" if self.decision is None else self.decision.replica

    def fill_decision(self, message: pb.Decision) -> None:
        """Only once it was dispatched."""
        decision = self.decision
        assert decision is not None
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
                cost=candidate.cost,
            )
