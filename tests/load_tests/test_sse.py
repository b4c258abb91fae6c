"""Events out of bytes, however these are cut."""

from __future__ import annotations

import pytest

from load_tests.sse import EventDecoder

STREAM = b': hello\r\n\r\ndata: {"a": 1}\r\n\r\nid: 7\ndata: two\ndata:lines\n\ndata: caf\xc3\xa9\n\ndata: [DONE]\n\n'
EVENTS = ['{"a": 1}', "two\nlines", "café", "[DONE]"]


def test_whole() -> None:
    assert EventDecoder().feed(STREAM) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_in_pieces(size: int) -> None:
    decoder = EventDecoder()
    pieces = [STREAM[start : start + size] for start in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in decoder.feed(piece)] == EVENTS


def test_what_is_not_complete_waits() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: one\n") == []
    assert decoder.feed(b"\ndata: tw") == ["one"]
    assert decoder.feed(b"o\n\n") == ["two"]


def test_empty_lines_are_no_events() -> None:
    assert EventDecoder().feed(b"\n\n\r\n") == []
