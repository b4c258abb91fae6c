"""The one table of reasons: the gRPC code that each comes with, what it means, and whether to try again.

Standard library only. `Retry` says what a caller does who wants the answer anyway:

    NO     the same request fails again: change it, or what it is about
    AFTER  the same request may succeed later, after the status' RetryInfo
    NOW    the same request may succeed at once, at another router or replica; with RetryInfo, after that

`octavo.client` does so by itself as long as an answer has not begun.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

from octavo.names import Reason


class Retry(Enum):
    NO = "no"
    AFTER = "after the delay"
    NOW = "yes"


class About(NamedTuple):
    """What is to be said of one reason."""

    code: str
    meaning: str
    """One sentence, without a full stop."""
    retry: Retry = Retry.NO


CATALOGUE: Final[dict[str, About]] = {
    Reason.INVALID_FIELD: About(
        "INVALID_ARGUMENT", "A field breaks a rule; BadRequest names each, the rule and the value"
    ),
    Reason.EMPTY_PROMPT: About("INVALID_ARGUMENT", "The prompt has no token, or no message"),
    Reason.PROMPT_TOO_LONG: About(
        "INVALID_ARGUMENT", "The prompt, or prompt and max_tokens together, have more tokens than the model's context"
    ),
    Reason.TOKEN_ID_OUT_OF_RANGE: About("INVALID_ARGUMENT", "A token id is not of the model's vocabulary"),
    Reason.REQUEST_ID_IN_USE: About("INVALID_ARGUMENT", "A live request of the Session has this id already"),
    Reason.MODEL_NOT_FOUND: About("NOT_FOUND", "The cluster has no model of this name"),
    Reason.REQUEST_NOT_FOUND: About(
        "NOT_FOUND", "The router has no such request: it never had, or its Session's grace is over"
    ),
    Reason.FIELD_NOT_SERVED: About("UNIMPLEMENTED", "A field is set that no engine of this release serves"),
    Reason.ENGINE_CAPABILITY: About(
        "FAILED_PRECONDITION", "The request needs something that this model's engine does not have"
    ),
    Reason.INCOMPATIBLE_PEER: About(
        "FAILED_PRECONDITION", "Router and replica differ in protocol, model or secret; between processes of a cluster"
    ),
    Reason.QUEUE_FULL: About(
        "RESOURCE_EXHAUSTED", "The queue is full, and the tenant has its part of it or more", Retry.AFTER
    ),
    Reason.DEADLINE_TOO_SHORT: About(
        "RESOURCE_EXHAUSTED",
        "By measured speeds the deadline cannot be met; told before anything is computed",
        Retry.AFTER,
    ),
    Reason.SLOW_CONSUMER: About("RESOURCE_EXHAUSTED", "Nobody took the answer for router.slow_consumer_s"),
    Reason.MESSAGE_TOO_LARGE: About("RESOURCE_EXHAUSTED", "The message has more bytes than router.max_message_bytes"),
    Reason.SESSION_LIMIT: About("RESOURCE_EXHAUSTED", "The Session has router.max_session_requests live requests"),
    Reason.QUOTA_EXCEEDED: About(
        "RESOURCE_EXHAUSTED", "The tenant has had its requests or tokens of this minute", Retry.AFTER
    ),
    Reason.NO_REPLICA: About(
        "UNAVAILABLE", "No replica was ready in time, or none can be before the deadline", Retry.NOW
    ),
    Reason.MODEL_FAILED: About("UNAVAILABLE", "This model cannot be served, though others are", Retry.NOW),
    Reason.REPLICA_LOST: About("UNAVAILABLE", "Replicas died one after the other with this request", Retry.NOW),
    Reason.DRAINING: About("UNAVAILABLE", "The router is going and takes nothing new", Retry.NOW),
    Reason.SESSION_LOST: About(
        "UNAVAILABLE", "The Session broke and the answer could not be taken up again; made by the client", Retry.NOW
    ),
    Reason.SESSION_AGE: About(
        "UNAVAILABLE", "Of a GoAway: nothing is wrong, the next Session may find another router", Retry.NOW
    ),
    Reason.DEADLINE_PASSED: About("DEADLINE_EXCEEDED", "The deadline passed before the answer was complete"),
    Reason.DEADLINE_UNREACHABLE: About(
        "DEADLINE_EXCEEDED", "After its wait in the queue what is left does not suffice; nothing was computed"
    ),
    Reason.CANCELLED: About("CANCELLED", "The client cancelled the request or left"),
    Reason.BAD_PROOF: About(
        "UNAUTHENTICATED", "A router could not prove the cluster's secret; between processes of a cluster"
    ),
    Reason.NO_CREDENTIALS: About("UNAUTHENTICATED", "The call brings neither a bearer token nor a certificate"),
    Reason.BAD_CREDENTIALS: About(
        "UNAUTHENTICATED", "The token is no key of this cluster, or the certificate names no tenant"
    ),
    Reason.KEY_REVOKED: About("UNAUTHENTICATED", "The key was revoked"),
    Reason.KEY_EXPIRED: About("UNAUTHENTICATED", "The key has expired"),
    Reason.TENANT_MISMATCH: About("PERMISSION_DENIED", "The certificate and the token are of different tenants"),
    Reason.INTERNAL: About("INTERNAL", "A failure of the cluster; its log says more"),
}
"""By the constants of `octavo.names.Reason`, in their order."""
