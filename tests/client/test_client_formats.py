"""What shape an answer must have, as Python arguments."""

from __future__ import annotations

from typing import Any

import pytest
from octavo.client.errors import InvalidArgumentError
from octavo.client.request import make_request
from octavo.v1 import types_pb2 as types


@pytest.mark.parametrize(
    ("asked", "sent"),
    [
        ({"json_object": True}, types.ResponseFormat(json_object=types.ResponseFormat.JsonObject())),
        ({"json_schema": {"type": "object"}}, types.ResponseFormat(json_schema='{"type": "object"}')),
        ({"json_schema": "{}"}, types.ResponseFormat(json_schema="{}")),
        ({"regex": "a+"}, types.ResponseFormat(regex="a+")),
        ({"grammar": "root ::= x"}, types.ResponseFormat(grammar="root ::= x")),
    ],
)
def test_a_shape_is_one_field(asked: dict[str, Any], sent: types.ResponseFormat) -> None:
    assert make_request("p", model="", options={"response_format": asked}).response_format == sent


@pytest.mark.parametrize(
    "asked", [{}, {"regex": "a", "grammar": "b"}, {"json_object": False}, {"xml": "a"}, {"regex": 1}, "a+"]
)
def test_what_is_no_shape_is_refused(asked: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="response_format"):
        make_request("p", model="", options={"response_format": asked})
