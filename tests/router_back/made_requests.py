"""Requests as tests of queue and placement need them: with what matters there, and the rest as it may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from router.queued import Queued
from router.types import Request
from workers.types import SamplingParams


def make_request(prompt: Sequence[int], **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "request_id": "r",
        "model": "fake",
        "prompt": prompt,
        "sampling": SamplingParams(),
        "max_tokens": 1,
        "deadline": 1e6,
        "accepted_at": 0.0,
    }
    return Request(**(defaults | fields))


def make_queued(
    key: int,
    prompt: Sequence[int],
    *,
    cost: int | None = None,
    since: float = 0.0,
    latest_start: float = math.inf,
    **fields: Any,
) -> Queued:
    """Return a request that waits since then, at the cost of its prompt and one token; `fields` are the request's."""
    fields = {"request_id": str(key), "accepted_at": float(key), "has_own_deadline": latest_start < math.inf} | fields
    return Queued(
        key=key,
        request=make_request(prompt, **fields),
        since=since,
        cost=len(prompt) + 1 if cost is None else cost,
        latest_start=latest_start,
    )
