"""What `Client.embed` and its like refuse by themselves: what cannot be written down for a router."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from octavo.client import Client, InvalidArgumentError
from octavo.names import Reason

Ask = Callable[[Client], Awaitable[Any]]
BAD: dict[str, tuple[Ask, str]] = {
    "one text, each character of which would be an input": (lambda client: client.embed("cat"), "inputs"),
    "one text to classify": (lambda client: client.classify("cat"), "inputs"),
    "one document": (lambda client: client.rerank("cat", "mat"), "documents"),
    "a pair that is one text": (lambda client: client.score(["ab"]), "pairs[0]"),  # type: ignore[list-item]
    "three texts": (lambda client: client.score([("a", "b"), ("a", "b", "c")]), "pairs[1]"),  # type: ignore[list-item]
    "a lone surrogate": (lambda client: client.embed(["a", "\ud800"]), "inputs[1]"),
    "one in a query": (lambda client: client.rerank("\ud800", ["a"]), "query"),
    "a token below 0": (lambda client: client.embed([[-1]]), "inputs[0]"),
    "token ids of one input": (lambda client: client.embed([5, 6]), "inputs[0]"),  # type: ignore[list-item]
}


@pytest.mark.parametrize("what", BAD)
async def test_what_cannot_be_sent_is_refused_by_field(what: str) -> None:
    ask, field = BAD[what]
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgumentError) as caught:
            await ask(client)
    assert caught.value.reason == Reason.INVALID_FIELD
    assert [violation.field for violation in caught.value.field_violations] == [field]
