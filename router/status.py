"""Errors as a client sees them: the only file that turns `workers.errors` into gRPC statuses and Terminals.

A status is a google.rpc.Status with ErrorInfo, and where they say something BadRequest and RetryInfo, in the trailer
``grpc-status-details-bin``. What went wrong inside is logged here and told to no client. Bounds the size of all, since
clients take 8 KiB of trailers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from octavo.names import ERROR_DOMAIN, Reason
from octavo.v1.inference_service_pb2 import Terminal
from octavo.v1.types_pb2 import FieldViolation

from workers.errors import InvalidRequestError, OctavoError, OverloadedError

logger = logging.getLogger(__name__)

DETAILS_KEY = "grpc-status-details-bin"
MAX_VIOLATIONS = 16
MAX_DESCRIPTION = 160
MAX_FIELD = 100
MAX_MESSAGE = 500
MAX_ABORT_S = 2.0
MAX_DURATION_S = 315_576_000_000.0
"""What a protobuf Duration can say; a quota of next to nothing makes clients wait for longer."""
INTERNAL_MESSAGE = "internal error; the router's log says more"


def code_of(error: OctavoError | None) -> grpc.StatusCode:
    return grpc.StatusCode.OK if error is None else grpc.StatusCode[error.code]


def code_number(error: OctavoError | None) -> int:
    """Return the google.rpc.Code; 0 is OK."""
    number: int = code_of(error).value[0]
    return number


def unexpected(error: BaseException) -> OctavoError:
    """Log a failure of ours and return what the client may know of it."""
    logger.error("unexpected failure in the router", exc_info=error)
    internal = OctavoError(INTERNAL_MESSAGE)
    internal.__cause__ = error
    return internal


def message_of(error: OctavoError) -> str:
    """Return the text for the client: of an INTERNAL one at most one line, so that it is no stack trace."""
    return message_of_text(str(error), error.code)


def message_of_text(text: str, code: str) -> str:
    """Return what a client may be told of an error of `code` that says `text`."""
    if code == "INTERNAL" and ("\n" in text or not text):
        return INTERNAL_MESSAGE
    return _cut(text, MAX_MESSAGE)


def to_status(error: OctavoError) -> status_pb2.Status:
    status = status_pb2.Status(code=code_number(error), message=message_of(error))
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN)]
    if error.violations:
        bad_request = error_details_pb2.BadRequest()
        for field, description in error.violations[:MAX_VIOLATIONS]:
            bad_request.field_violations.add(field=_cut(field, MAX_FIELD), description=_cut(description))
        details.append(bad_request)
    if error.retry_after_s is not None:
        details.append(error_details_pb2.RetryInfo(retry_delay=duration(error.retry_after_s)))
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def to_terminal(error: OctavoError | None) -> Terminal:
    """Return a Terminal with code, reason, message, violations and retry delay."""
    if error is None:
        return Terminal()
    return Terminal(
        code=code_number(error),
        reason=error.reason,
        message=message_of(error),
        field_violations=[
            FieldViolation(field=_cut(field, MAX_FIELD), description=_cut(description))
            for field, description in error.violations[:MAX_VIOLATIONS]
        ],
        retry_delay=None if error.retry_after_s is None else duration(error.retry_after_s),
    )


async def abort(
    context: grpc.aio.ServicerContext[Any, Any], error: OctavoError, trailers: tuple[tuple[str, str], ...] = ()
) -> NoReturn:
    """End the call with `error`. Raises, as `context.abort` does; CancelledError if it was over already.

    The status leaves after all messages before it. A client that takes none of these gets it whenever it reads on; the
    call's handler does not wait for that longer than `MAX_ABORT_S`.
    """
    details = (DETAILS_KEY, to_status(error).SerializeToString())
    try:
        async with asyncio.timeout(MAX_ABORT_S):
            await context.abort(code_of(error), message_of(error), trailing_metadata=(*trailers, details))
    except (TimeoutError, grpc.aio.InternalError):  # the latter in the moment in which a client leaves
        raise asyncio.CancelledError from None
    raise AssertionError("context.abort returned")


def undecodable() -> OctavoError:
    """What a message that is no protobuf of its type gets."""
    return InvalidRequestError("the message is not a valid protobuf of its type", reason=Reason.INVALID_FIELD)


def too_large(num_bytes: int, max_bytes: int) -> OctavoError:
    """What a message of more than `max_bytes` gets, which is not parsed."""
    message = f"a message must have at most {max_bytes} bytes (the router's max_message_bytes), has {num_bytes}"
    return OverloadedError(message, reason=Reason.MESSAGE_TOO_LARGE)


def duration(seconds: float) -> Duration:
    fraction, whole = math.modf(min(max(seconds, 0.0), MAX_DURATION_S))
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def _cut(text: str, length: int = MAX_DESCRIPTION) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
