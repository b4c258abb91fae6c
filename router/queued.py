"""A request that waits before the replicas, with what its order depends on. A value; decides nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from router.placement import PromptHashes
from router.types import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued:
    """`key` is the dispatcher's number for it; `since` is when this wait began."""

    key: int
    request: Request
    attempt: int = 1
    since: float
    cost: int
    """What its tenant is charged when it goes: prompt and expected answer, in tokens."""
    latest_start: float = math.inf
    """When it must go, by the speed measured so far and with a margin, to meet the deadline that its client brought.
    Infinite without such a deadline."""
    hashes: PromptHashes | None = None
    """None: it shares nothing with others."""

    @property
    def num_tokens(self) -> int:
        return self.request.num_known_tokens
