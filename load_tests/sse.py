"""Server-sent events out of the bytes of a response. Pure: pieces of bytes in, data of whole events out.

Knows the part of the format that OpenAI-compatible servers use: lines `data: ...`, and empty ones between events.
"""

from __future__ import annotations


class EventDecoder:
    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, piece: bytes) -> list[str]:
        """Return the data of the events that `piece` completes; what is not complete waits for the next piece.

        Lines end with LF or CRLF, wherever the pieces are cut. Comments and other fields are passed over.
        """
        lines = (self._rest + piece).split(b"\n")
        self._rest = lines.pop()
        events = []
        for line in lines:
            field, _, value = line.removesuffix(b"\r").partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
            elif not field and not value and self._data:
                events.append(b"\n".join(self._data).decode())
                self._data = []
        return events
