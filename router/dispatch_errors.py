"""Why the router's back itself ends a request: the errors, in words for a client. Pure."""

from __future__ import annotations

from typing import Final

from octavo.names import Reason

from router.admission import MAX_RETRY_S, MIN_RETRY_S
from router.types import Request
from workers.errors import (
    CancelledRequestError,
    CapabilityError,
    DeadlineError,
    OverloadedError,
    UnavailableError,
    Violation,
)
from workers.types import (
    CAPABILITY_FORMAT,
    CAPABILITY_LOGIT_BIAS,
    CAPABILITY_LOGPROBS,
    CAPABILITY_RECEIVED_CHOICES,
    CAPABILITY_RECEIVED_FORMAT,
    CAPABILITY_RECEIVED_PENALTIES,
)

_FIELDS: Final = {
    CAPABILITY_LOGPROBS: "logprobs",
    CAPABILITY_LOGIT_BIAS: "sampling.logit_bias",
    CAPABILITY_FORMAT: "response_format",
    CAPABILITY_RECEIVED_FORMAT: "received_token_ids",
    CAPABILITY_RECEIVED_CHOICES: "received_token_ids",
    CAPABILITY_RECEIVED_PENALTIES: "received_token_ids",
}
"""Of a request, by the capability that they need; best_of needs that of logprobs."""


def capability_error(missing: frozenset[str]) -> CapabilityError:
    violations = [
        Violation(_FIELDS.get(name, name), f"no replica of this model has an engine with the capability {name!r}")
        for name in sorted(missing)
    ]
    return CapabilityError("; ".join(f"{field}: {rule}" for field, rule in violations), violations=violations)


def deadline_error(request: Request, now: float) -> DeadlineError:
    waited = now - request.accepted_at
    return DeadlineError(f"the deadline passed {waited:.3f} s after the request was accepted")


def unreachable_error(request: Request, now: float) -> DeadlineError:
    waited, left = now - request.accepted_at, request.deadline - now
    return DeadlineError(
        f"after {waited:.3f} s in the queue the {left:.3f} s that are left do not suffice for an answer, by the speed "
        f"of late",
        reason=Reason.DEADLINE_UNREACHABLE,
    )


def too_short_error(request: Request, now: float, *, service_s: float, shortfall_s: float) -> OverloadedError:
    return OverloadedError(
        f"the deadline is in {request.deadline - now:.3f} s; by the speed of late an answer takes {service_s:.3f} s, "
        f"which with the queue before it is {shortfall_s:.3f} s too long",
        reason=Reason.DEADLINE_TOO_SHORT,
        retry_after_s=min(max(shortfall_s, MIN_RETRY_S), MAX_RETRY_S),
    )


def gave_way_error(refusal: OverloadedError) -> OverloadedError:
    return OverloadedError(
        "this request had to give way: the queue is full, and its tenant had most of it",
        retry_after_s=refusal.retry_after_s,
    )


def no_replica_error(wait_s: float) -> UnavailableError:
    return UnavailableError(f"no replica was ready within {wait_s:g} s", reason=Reason.NO_REPLICA)


def model_error(name: str, failure: str) -> UnavailableError:
    return UnavailableError(
        f"model {name} cannot be served: {failure}", reason=Reason.MODEL_FAILED, retry_after_s=MAX_RETRY_S
    )


def start_error(ready_in_s: float, left_s: float) -> UnavailableError:
    return UnavailableError(
        f"no replica is ready; the next one is expected in {ready_in_s:.1f} s, and the deadline is in {left_s:.1f} s",
        reason=Reason.NO_REPLICA,
        retry_after_s=min(max(ready_in_s, MIN_RETRY_S), MAX_RETRY_S),
    )


def lost_error(message: str) -> UnavailableError:
    return UnavailableError(message, reason=Reason.REPLICA_LOST)


def draining_error() -> UnavailableError:
    return UnavailableError("this router is draining: it takes no new requests", reason=Reason.DRAINING)


def stopping_error() -> UnavailableError:
    return UnavailableError("this router is stopping", reason=Reason.DRAINING)


def cancelled_error() -> CancelledRequestError:
    return CancelledRequestError("the request was cancelled")
