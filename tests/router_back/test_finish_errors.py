"""From an engine's finish to the error that its request gets."""

from __future__ import annotations

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from router.finish_errors import error_of
from router.wire import from_finish
from workers.types import Finish, FinishReason


@pytest.mark.parametrize(
    ("finish", "code", "reason"),
    [
        (Finish(reason=FinishReason.DEADLINE), "DEADLINE_EXCEEDED", Reason.DEADLINE_PASSED),
        (Finish(reason=FinishReason.CANCELLED), "CANCELLED", Reason.CANCELLED),
        (Finish(reason=FinishReason.ERROR), "INTERNAL", Reason.INTERNAL),
        (Finish(reason=FinishReason.ERROR, error_reason="FROM_THE_FUTURE"), "INTERNAL", Reason.INTERNAL),
        (
            Finish(reason=FinishReason.ERROR, error_reason=Reason.PROMPT_TOO_LONG),
            "INVALID_ARGUMENT",
            Reason.PROMPT_TOO_LONG,
        ),
        (
            Finish(reason=FinishReason.ERROR, error_reason=Reason.ENGINE_CAPABILITY),
            "FAILED_PRECONDITION",
            Reason.ENGINE_CAPABILITY,
        ),
        (Finish(reason=FinishReason.ERROR, error_reason=Reason.DRAINING), "UNAVAILABLE", Reason.DRAINING),
    ],
)
def test_each_reason_has_its_code(finish: Finish, code: str, reason: str) -> None:
    error = error_of(finish)
    assert (error.code, error.reason) == (code, reason)
    assert str(error)


def test_the_engines_message_is_kept() -> None:
    finish = Finish(
        reason=FinishReason.ERROR, error_reason=Reason.EMPTY_PROMPT, error_message="prompt must not be empty"
    )
    assert str(error_of(finish)) == "prompt must not be empty"


def test_a_good_finish_is_no_error() -> None:
    with pytest.raises(AssertionError):
        error_of(Finish(reason=FinishReason.STOP))


def test_an_unknown_reason_on_the_wire_is_an_error() -> None:
    assert from_finish(pb.Finish(reason="from the future")).reason is FinishReason.ERROR
