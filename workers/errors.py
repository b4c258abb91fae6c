"""Everything that can go wrong for a user, as one tree; ``router/status.py`` alone turns it into gRPC statuses.

    OctavoError                    INTERNAL
    ├── InvalidRequestError        INVALID_ARGUMENT     the request breaks a rule; says field, rule and value
    ├── NotFoundError              NOT_FOUND            no such model or request
    ├── NotServedError             UNIMPLEMENTED        a field that no engine of this release serves
    ├── CapabilityError            FAILED_PRECONDITION  this model's engine, or this peer, lacks something
    ├── OverloadedError            RESOURCE_EXHAUSTED   a queue, quota or buffer is full
    ├── UnavailableError           UNAVAILABLE          nobody can serve it now: the one that may be retried blindly
    ├── DeadlineError              DEADLINE_EXCEEDED
    ├── CancelledRequestError      CANCELLED
    ├── UnauthenticatedError       UNAUTHENTICATED
    ├── ForbiddenError             PERMISSION_DENIED
    └── StartupError               never on the wire: the CLI prints it and exits with `exit_code`
        ├── ConfigError            exit code 2
        ├── ModelFileError         exit code 3          missing, corrupt, truncated, unsupported, or does not fit
        └── PortInUseError         exit code 4

`reason` is a constant of `octavo.names.Reason`, stable across releases; `str(error)` has the rule and the value.
`assert` is for our own bugs, these are for the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from octavo.names import Reason


class Violation(NamedTuple):
    """A field (a path in the request, "sampling.top_p") and the rule it breaks, with the value."""

    field: str
    description: str


class OctavoError(Exception):
    code: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = Reason.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        violations: Sequence[Violation] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or self.default_reason
        self.violations = tuple(violations)
        self.retry_after_s = retry_after_s


class InvalidRequestError(OctavoError):
    code = "INVALID_ARGUMENT"
    default_reason = Reason.INVALID_FIELD


class NotFoundError(OctavoError):
    code = "NOT_FOUND"
    default_reason = Reason.MODEL_NOT_FOUND


class NotServedError(OctavoError):
    code = "UNIMPLEMENTED"
    default_reason = Reason.FIELD_NOT_SERVED


class CapabilityError(OctavoError):
    code = "FAILED_PRECONDITION"
    default_reason = Reason.ENGINE_CAPABILITY


class OverloadedError(OctavoError):
    code = "RESOURCE_EXHAUSTED"
    default_reason = Reason.QUEUE_FULL


class UnavailableError(OctavoError):
    code = "UNAVAILABLE"
    default_reason = Reason.NO_REPLICA


class DeadlineError(OctavoError):
    code = "DEADLINE_EXCEEDED"
    default_reason = Reason.DEADLINE_PASSED


class CancelledRequestError(OctavoError):
    code = "CANCELLED"
    default_reason = Reason.CANCELLED


class UnauthenticatedError(OctavoError):
    code = "UNAUTHENTICATED"
    default_reason = Reason.BAD_PROOF


class ForbiddenError(OctavoError):
    code = "PERMISSION_DENIED"


class StartupError(OctavoError):
    exit_code: ClassVar[int] = 1


class ConfigError(StartupError):
    exit_code = 2


class ModelFileError(StartupError):
    exit_code = 3


class PortInUseError(StartupError):
    exit_code = 4
