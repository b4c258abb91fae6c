"""What a call can raise, as one tree; every error of `octavo.client` that comes from outside is a `CallError`.

    CallError                        any other code
    ├── InvalidArgumentError         INVALID_ARGUMENT     `field_violations` say which field breaks which rule
    ├── NotFoundError                NOT_FOUND            no such model
    ├── UnimplementedError           UNIMPLEMENTED        a field that this release does not serve
    ├── FailedPreconditionError      FAILED_PRECONDITION  this model's engine cannot do it
    ├── ResourceExhaustedError       RESOURCE_EXHAUSTED   a queue or quota is full; `retry_delay` says when to come back
    ├── UnavailableError             UNAVAILABLE          nobody can serve it now
    │   └── ConnectionFailedError    UNAVAILABLE          no router was reached
    ├── DeadlineExceededError        DEADLINE_EXCEEDED    the request's timeout passed
    ├── RequestCancelledError        CANCELLED            cancelled, by whomever
    ├── UnauthenticatedError         UNAUTHENTICATED
    ├── PermissionDeniedError        PERMISSION_DENIED
    └── InternalError                INTERNAL

Wrong use of the library itself (a closed client, an answer read twice at once) is a RuntimeError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2

_STATUS_DETAILS_KEY = "grpc-status-details-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """A field (its path in the request, "sampling.top_p") and the rule that it breaks, with the value."""

    field: str
    description: str


class CallError(Exception):
    """A call or request that did not end well.

    `reason` is stable across releases (`octavo.names.Reason`), `message` is for people and has the rule and the value,
    `retry_delay` is in seconds, where the router could tell.
    """

    default_code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode | None = None,
        reason: str = "",
        field_violations: Iterable[FieldViolation] = (),
        retry_delay: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.reason = reason
        self.field_violations = tuple(field_violations)
        self.retry_delay = retry_delay

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" + (f" [{self.reason}]" if self.reason else "")

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later: always for UNAVAILABLE, after `retry_delay` for a full queue."""
        return self.code is grpc.StatusCode.UNAVAILABLE or (
            self.code is grpc.StatusCode.RESOURCE_EXHAUSTED and self.retry_delay is not None
        )


class InvalidArgumentError(CallError):
    default_code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(CallError):
    default_code = grpc.StatusCode.NOT_FOUND


class UnimplementedError(CallError):
    default_code = grpc.StatusCode.UNIMPLEMENTED


class FailedPreconditionError(CallError):
    default_code = grpc.StatusCode.FAILED_PRECONDITION


class ResourceExhaustedError(CallError):
    default_code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(CallError):
    default_code = grpc.StatusCode.UNAVAILABLE


class ConnectionFailedError(UnavailableError):
    """No router was reached: none listens, the network is cut, or TLS failed."""


class DeadlineExceededError(CallError):
    default_code = grpc.StatusCode.DEADLINE_EXCEEDED


class RequestCancelledError(CallError):
    default_code = grpc.StatusCode.CANCELLED


class UnauthenticatedError(CallError):
    default_code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(CallError):
    default_code = grpc.StatusCode.PERMISSION_DENIED


class InternalError(CallError):
    default_code = grpc.StatusCode.INTERNAL


_CLASSES: dict[grpc.StatusCode, type[CallError]] = {cls.default_code: cls for cls in CallError.__subclasses__()}
"""Those above; whoever derives from them changes nothing here."""


def from_terminal(terminal: pb.Terminal) -> CallError:
    """Return the error that a request's Terminal reports. Its code is not OK."""
    code = _CODES.get(terminal.code, grpc.StatusCode.UNKNOWN)
    return _CLASSES.get(code, CallError)(
        terminal.message,
        code=code,
        reason=terminal.reason,
        field_violations=_violations(terminal.field_violations),
        retry_delay=_seconds(terminal.retry_delay) if terminal.HasField("retry_delay") else None,
    )


def from_rpc(error: grpc.aio.AioRpcError) -> CallError:
    """Return the error that a failed call reports, with what its google.rpc.Status carries."""
    reason = ""
    violations: tuple[FieldViolation, ...] = ()
    retry_delay: float | None = None
    for detail in _details(error):
        info, bad, retry = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad):
            violations = _violations(bad.field_violations)
        elif detail.Unpack(retry):
            retry_delay = _seconds(retry.retry_delay)
    code = error.code()
    return _CLASSES.get(code, CallError)(
        error.details() or "", code=code, reason=reason, field_violations=violations, retry_delay=retry_delay
    )


def _details(error: grpc.aio.AioRpcError) -> Sequence[status_pb2.Any]:
    for key, value in error.trailing_metadata() or ():
        if key == _STATUS_DETAILS_KEY and isinstance(value, bytes):
            try:
                return tuple(status_pb2.Status.FromString(value).details)
            except ValueError:  # a proxy's own idea of details; code and message still stand
                return ()
    return ()


def _violations(violations: Iterable[types_pb2.FieldViolation]) -> tuple[FieldViolation, ...]:
    return tuple(FieldViolation(each.field, each.description) for each in violations)


def _seconds(duration: duration_pb2.Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
