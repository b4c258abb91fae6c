"""Why the router's back itself ends a request: the errors, in words for a client. Pure."""

from __future__ import annotations

from typing import Final

from octavo.names import Reason

from router.types import Request
from workers.errors import CancelledRequestError, CapabilityError, DeadlineError, UnavailableError, Violation
from workers.types import CAPABILITY_LOGIT_BIAS, CAPABILITY_LOGPROBS, CAPABILITY_RECEIVED_CHOICES

_FIELDS: Final = {
    CAPABILITY_LOGPROBS: "logprobs",
    CAPABILITY_LOGIT_BIAS: "sampling.logit_bias",
    CAPABILITY_RECEIVED_CHOICES: "received_token_ids",
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


def no_replica_error(wait_s: float) -> UnavailableError:
    return UnavailableError(f"no replica was ready within {wait_s:g} s", reason=Reason.NO_REPLICA)


def lost_error(message: str) -> UnavailableError:
    return UnavailableError(message, reason=Reason.REPLICA_LOST)


def draining_error() -> UnavailableError:
    return UnavailableError("this router is draining: it takes no new requests", reason=Reason.DRAINING)


def stopping_error() -> UnavailableError:
    return UnavailableError("this router is stopping", reason=Reason.DRAINING)


def cancelled_error() -> CancelledRequestError:
    return CancelledRequestError("the request was cancelled")
