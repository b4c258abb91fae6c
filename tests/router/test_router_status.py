"""One table from errors to statuses."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from router import status
from workers import errors
from workers.errors import OctavoError, Violation


def tree(root: type[OctavoError]) -> list[type[OctavoError]]:
    """What ``workers/errors.py`` draws; a command's own errors, which never travel, may be imported already."""
    children = [child for child in root.__subclasses__() if child.__module__ == errors.__name__]
    return [root, *(found for child in children for found in tree(child))]


@pytest.mark.parametrize("kind", tree(OctavoError))
def test_every_error_has_a_code_and_a_reason(kind: type[OctavoError]) -> None:
    error = kind("the rule, is 5")
    made = status.to_status(error)
    terminal = status.to_terminal(error)
    assert made.code == terminal.code == grpc.StatusCode[kind.code].value[0] != 0
    info = error_details_pb2.ErrorInfo()
    assert made.details[0].Unpack(info)
    assert (info.reason, info.domain) == (error.reason, "octavo")
    assert (terminal.reason, terminal.message) == (error.reason, made.message) == (info.reason, "the rule, is 5")


def test_ok_is_an_empty_terminal() -> None:
    assert status.to_terminal(None).ByteSize() == 0
    assert status.code_of(None) is grpc.StatusCode.OK


def test_details() -> None:
    error = errors.OverloadedError("full", violations=[Violation("a.b", "must be 1, is 2")], retry_after_s=0.25)
    bad, retry = error_details_pb2.BadRequest(), error_details_pb2.RetryInfo()
    _, packed_bad, packed_retry = status.to_status(error).details
    assert packed_bad.Unpack(bad)
    assert packed_retry.Unpack(retry)
    assert [(v.field, v.description) for v in bad.field_violations] == [("a.b", "must be 1, is 2")]
    assert retry.retry_delay.nanos == 250_000_000
    terminal = status.to_terminal(error)
    assert terminal.field_violations[0].field == "a.b"
    assert terminal.retry_delay == retry.retry_delay


@pytest.mark.parametrize("message", ["Traceback (most recent call last):\n  File", "", "a\nb"])
def test_internal_errors_have_one_line_at_most(message: str) -> None:
    assert status.message_of(OctavoError(message)) == status.INTERNAL_MESSAGE
    assert status.message_of(OctavoError("block 7 is lost")) == "block 7 is lost"


def test_a_status_is_bounded() -> None:
    violations = [Violation("f" * 1_000, "d" * 1_000)] * 1_000
    error = errors.InvalidRequestError("m" * 100_000, violations=violations)
    assert status.to_status(error).ByteSize() < 6_000
    assert status.to_terminal(error).ByteSize() < 6_000


def test_a_negative_retry_delay_is_none() -> None:
    assert status.duration(-1).ToNanoseconds() == 0
    assert status.duration(1.5).ToNanoseconds() == 1_500_000_000


async def test_to_abort_a_call_that_is_over_ends_as_if_it_were_cancelled() -> None:
    """gRPC would log it as a fault of ours, for every client that leaves in that moment."""

    class Over:
        async def abort(self, *_: object, **__: object) -> None:
            raise grpc.aio.InternalError("a batch failed")

    with pytest.raises(asyncio.CancelledError):
        await status.abort(Over(), errors.DeadlineError("late"))  # type: ignore[arg-type]
