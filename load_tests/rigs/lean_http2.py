"""HTTP/2 by hand, as much of it as unary requests with streamed answers of gRPC take: for clients that cost next to
nothing, as those in compiled languages do. A grpc.aio client takes as much of a core for a message as a router does.

    connection = await Http2.connect("127.0.0.1:8000", listener)
    stream = connection.call("/octavo.v1.InferenceService/Generate", message)
    ... listener.arrived(stream, message) for each message, then listener.ended(stream, status) ...

    stream = connection.open("/octavo.v1.InferenceService/Session")        a stream of requests, too
    connection.send(stream, message)

To servers that are trusted: no flow control of what is received (its windows are as large as can be), no compression of
headers in either direction, no cancels, no deadlines. In clear text, or with TLS that Python's own library speaks.
"""

from __future__ import annotations

import asyncio
import ssl
import struct
from collections import deque
from typing import Final, Protocol, cast

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE = 1, 2, 4
MAX_WINDOW: Final = 2**31 - 1
DEFAULT_WINDOW: Final = 65_535
CANCELLED: Final = "1"
"""gRPC's number for it, as UNAVAILABLE's."""
UNAVAILABLE: Final = "14"
_FRAME = struct.Struct(">IBI")
"""Length and type, flags, stream."""


class Listener(Protocol):
    def arrived(self, stream: int, message: bytes) -> None: ...

    def ended(self, stream: int, status: str) -> None:
        """With gRPC's number of the status, in digits. Each stream ends once."""


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return _FRAME.pack(len(payload) << 8 | kind, flags, stream) + payload


def request_headers(authority: str, path: str, *, is_secure: bool = False, token: str = "") -> bytes:
    """Return the header block of a gRPC request: names from the static table where they are there, values as they
    are. `token`: the caller's bearer token; empty: none."""

    def text(value: str) -> bytes:
        data = value.encode()
        assert len(data) < 127
        return bytes([len(data)]) + data

    return b"".join(
        (
            b"\x83\x87" if is_secure else b"\x83\x86",  # :method POST, :scheme https or http
            b"\x04" + text(path),
            b"\x01" + text(authority),
            b"\x0f\x10" + text("application/grpc"),  # content-type
            b"\x00" + text("te") + text("trailers"),
            b"\x0f\x08" + text(f"Bearer {token}") if token else b"",  # authorization
        )
    )


def status_of(trailers: bytes) -> str:
    """Return the grpc-status in a header block of a server that was told to keep no table of headers."""
    name = b"grpc-status"
    start = trailers.find(name)
    if start < 0:
        return UNAVAILABLE
    size = trailers[start + len(name)]
    value = trailers[start + len(name) + 1 : start + len(name) + 1 + size]
    return value.decode("ascii", "replace")


class Http2(asyncio.Protocol):
    """One connection. Every call ends at `listener`, also when the connection breaks."""

    def __init__(self, authority: str, listener: Listener, *, is_secure: bool = False, token: str = "") -> None:
        self._authority = authority
        self._listener = listener
        self._is_secure = is_secure
        self._token = token
        self._transport: asyncio.Transport
        self._received = b""
        self._next_stream = 1
        self._parts: dict[int, bytes] = {}
        """By open stream: what has come of a message that is not whole."""
        self._headers: dict[str, bytes] = {}
        self._window = DEFAULT_WINDOW
        """Bytes that may be sent."""
        self._windows: dict[int, int] = {}
        """The same of each stream of several messages; a request alone fits."""
        self._initial_window = DEFAULT_WINDOW
        self._waiting: deque[tuple[int, int, bytes]] = deque()
        """Messages for which a window is too small: their stream, bytes of data, and the frames."""

    @classmethod
    async def connect(cls, target: str, listener: Listener, *, ca_file: str = "", token: str = "") -> Http2:
        """Connect to HOST:PORT, with TLS if `ca_file` has whom to trust. `token` goes with every request. Raises
        OSError."""
        host, _, port = target.rpartition(":")
        tls: ssl.SSLContext | None = None
        if ca_file:
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            tls.load_verify_locations(ca_file)
            tls.set_alpn_protocols(["h2"])
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(
            lambda: cls(target, listener, is_secure=tls is not None, token=token), host, int(port), ssl=tls
        )
        return connection

    def call(self, path: str, message: bytes) -> int:
        """Send a request; return its stream."""
        stream, headers = self._begin(path)
        data = _prefixed(message)
        self._waiting.append((stream, len(data), headers + frame(DATA, END_STREAM, stream, data)))
        self._send()
        return stream

    def open(self, path: str) -> int:
        """Begin a stream of requests; return it."""
        stream, headers = self._begin(path)
        self._windows[stream] = self._initial_window
        self._transport.write(headers)
        return stream

    def send(self, stream: int, message: bytes) -> None:
        """Send one more request of a stream that was opened."""
        data = _prefixed(message)
        self._waiting.append((stream, len(data), frame(DATA, 0, stream, data)))
        self._send()

    def close(self) -> None:
        """Streams that are open end as cancelled."""
        self._break(CANCELLED)
        if self._is_secure:
            self._transport.abort()  # TLS would wait for the server's farewell
        else:
            self._transport.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # which uvloop's is, but not by inheritance
        settings = ((HEADER_TABLE_SIZE, 0), (ENABLE_PUSH, 0), (INITIAL_WINDOW_SIZE, MAX_WINDOW))
        payload = b"".join(struct.pack(">HI", name, value) for name, value in settings)
        window = (MAX_WINDOW - DEFAULT_WINDOW).to_bytes(4, "big")
        transport.write(PREFACE + frame(SETTINGS, 0, 0, payload) + frame(WINDOW_UPDATE, 0, 0, window))

    def data_received(self, data: bytes) -> None:
        data = self._received + data if self._received else data
        start, end = 0, len(data)
        while end - start >= 9:
            head, flags, stream = _FRAME.unpack_from(data, start)
            after = start + 9 + (head >> 8)
            if after > end:
                break
            self._take(head & 0xFF, flags, stream, data[start + 9 : after])
            start = after
        self._received = data[start:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._break(UNAVAILABLE)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == DATA:
            self._take_data(stream, payload)
            if flags & END_STREAM:
                self._end(stream, UNAVAILABLE)  # without trailers: no server of gRPC does that
        elif kind == HEADERS:
            if flags & END_STREAM:
                self._end(stream, status_of(payload))
        elif kind == RST_STREAM:
            self._end(stream, CANCELLED)
        elif kind == SETTINGS and not flags & ACK:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == INITIAL_WINDOW_SIZE:
                    for each in self._windows:
                        self._windows[each] += value - self._initial_window
                    self._initial_window = value
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            if stream == 0:
                self._window += int.from_bytes(payload, "big")
            elif stream in self._windows:
                self._windows[stream] += int.from_bytes(payload, "big")
            self._send()
        elif kind == GOAWAY:
            self._transport.close()

    def _take_data(self, stream: int, payload: bytes) -> None:
        part = self._parts.get(stream)
        if part is None:
            return
        data = part + payload if part else payload
        start, end = 0, len(data)
        while end - start >= 5:
            after = start + 5 + int.from_bytes(data[start + 1 : start + 5], "big")
            if after > end:
                break
            self._listener.arrived(stream, data[start + 5 : after])
            start = after
        self._parts[stream] = data[start:]

    def _begin(self, path: str) -> tuple[int, bytes]:
        """Return a new stream and the frame that opens it."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        self._parts[stream] = b""
        headers = self._headers.get(path)
        if headers is None:
            headers = self._headers[path] = request_headers(
                self._authority, path, is_secure=self._is_secure, token=self._token
            )
        return stream, frame(HEADERS, END_HEADERS, stream, headers)

    def _end(self, stream: int, status: str) -> None:
        self._windows.pop(stream, None)
        if self._parts.pop(stream, None) is not None:
            self._listener.ended(stream, status)

    def _break(self, status: str) -> None:
        self._waiting.clear()
        for stream in list(self._parts):
            self._end(stream, status)

    def _send(self) -> None:
        frames = []
        while self._waiting:
            stream, size, text = self._waiting[0]
            if size > min(self._window, self._windows.get(stream, MAX_WINDOW)):
                break
            self._waiting.popleft()
            self._window -= size
            if stream in self._windows:
                self._windows[stream] -= size
            frames.append(text)
        if frames:
            self._transport.write(b"".join(frames))


def _prefixed(message: bytes) -> bytes:
    """Return a message as gRPC sends it, not compressed."""
    return b"\x00" + len(message).to_bytes(4, "big") + message
