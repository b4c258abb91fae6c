"""What an engine's unhappy finish means to the request: from `workers.types.Finish` to the tree of errors. Pure."""

from __future__ import annotations

from octavo.names import Reason

from workers.errors import (
    CancelledRequestError,
    CapabilityError,
    DeadlineError,
    InvalidRequestError,
    NotServedError,
    OctavoError,
    OverloadedError,
    UnavailableError,
)
from workers.types import Finish, FinishReason

_BY_REASON: dict[str, type[OctavoError]] = {
    Reason.INVALID_FIELD: InvalidRequestError,
    Reason.EMPTY_PROMPT: InvalidRequestError,
    Reason.PROMPT_TOO_LONG: InvalidRequestError,
    Reason.TOKEN_ID_OUT_OF_RANGE: InvalidRequestError,
    Reason.FIELD_NOT_SERVED: NotServedError,
    Reason.ENGINE_CAPABILITY: CapabilityError,
    Reason.INCOMPATIBLE_PEER: CapabilityError,
    Reason.QUEUE_FULL: OverloadedError,
    Reason.NO_REPLICA: UnavailableError,
    Reason.REPLICA_LOST: UnavailableError,
    Reason.DRAINING: UnavailableError,
}


def error_of(finish: Finish) -> OctavoError:
    """Return the error for a finish that is neither STOP nor LENGTH."""
    assert finish.reason not in (FinishReason.STOP, FinishReason.LENGTH)
    if finish.reason is FinishReason.DEADLINE:
        return DeadlineError("the deadline passed while the answer was being generated")
    if finish.reason is FinishReason.CANCELLED:
        return CancelledRequestError("the request was cancelled")
    # A reason that is not in the table is one of INTERNAL, whatever a newer replica calls it.
    kind = _BY_REASON.get(finish.error_reason)
    message = finish.error_message or "the engine failed"
    return kind(message, reason=finish.error_reason) if kind else OctavoError(message)
