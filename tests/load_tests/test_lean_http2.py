"""HTTP/2 by hand: what a client that costs nothing hears of a real server, in whatever pieces it comes."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from octavo.v1 import inference_service_pb2 as pb

from load_tests.rigs.lean_client import GenerateWay, LeanClient
from load_tests.rigs.lean_http2 import (
    ACK,
    CANCELLED,
    DATA,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    UNAVAILABLE,
    WINDOW_UPDATE,
    Http2,
    frame,
    status_of,
)
from tests.router.rig import Work, answering, running, text_request
from workers.errors import OverloadedError

GENERATE = "/octavo.v1.InferenceService/Generate"


class Heard:
    def __init__(self) -> None:
        self.messages: dict[int, list[bytes]] = {}
        self.ends: dict[int, str] = {}
        self.has_news = asyncio.Event()

    def arrived(self, stream: int, message: bytes) -> None:
        assert stream not in self.ends
        self.messages.setdefault(stream, []).append(message)
        self.has_news.set()

    def ended(self, stream: int, status: str) -> None:
        assert stream not in self.ends
        self.ends[stream] = status
        self.has_news.set()

    async def until_ended(self, *streams: int) -> None:
        async with asyncio.timeout(10.0):
            while not self.ends.keys() >= set(streams):
                self.has_news.clear()
                await self.has_news.wait()


async def test_answers_and_errors_of_a_router() -> None:
    def script(work: Work) -> None:
        if work.request.prompt[0] == ord("x"):
            work.end(OverloadedError("full"))
        else:
            answering("Grüße, 서울 🙂" * 20)(work)

    heard = Heard()
    async with running() as rig:
        rig.backend.script = script
        connection = await Http2.connect(rig.address, heard)
        requests = [text_request(prompt) for prompt in ("hello", "x", "hello")]
        streams = [connection.call(GENERATE, request.SerializeToString()) for request in requests]
        streams.append(connection.call("/octavo.v1.InferenceService/NoSuch", b""))
        await heard.until_ended(*streams)
        codes = (
            grpc.StatusCode.OK,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            grpc.StatusCode.OK,
            grpc.StatusCode.UNIMPLEMENTED,
        )
        assert [heard.ends[stream] for stream in streams] == [str(code.value[0]) for code in codes]
        for stream in (streams[0], streams[2]):
            deltas = [d for text in heard.messages[stream] for d in pb.GenerateResponse.FromString(text).deltas]
            assert "".join(delta.text for delta in deltas) == "Grüße, 서울 🙂" * 20
        last = connection.call(GENERATE, b"no message")
        await heard.until_ended(last)
        assert heard.ends[last] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
        connection.close()


class TextClient(LeanClient):
    """Asks for what the router of these tests knows."""

    def request(self) -> tuple[str, pb.GenerateRequest]:
        return super().request()[0], text_request()


async def test_a_lean_client_counts_what_a_router_answers() -> None:
    job = {"streams": 4, "seed": 1, "requests": 40, "clock": None, "prompt": 3, "output": 5, "is_staggered": False}
    client = TextClient({**job, "warm_up_s": 0.0, "duration_s": 30.0})
    async with running() as rig:
        rig.backend.script = answering("abcde")
        client.begin()
        await asyncio.wait_for(GenerateWay(client, rig.address).run(), 20.0)
    counts = client.counts
    assert (counts.sent, counts.ended, counts.ok, counts.extra, counts.tokens) == (40, 40, 40, 0, 200)


class Wire(asyncio.Transport):
    """Remembers what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.is_closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.is_closed = True


def made() -> tuple[Http2, Heard, Wire]:
    heard, wire = Heard(), Wire()
    connection = Http2("host:1", heard)
    connection.connection_made(wire)
    wire.written = b""
    return connection, heard, wire


@pytest.mark.parametrize("size", [1, 2, 3, 7, 20, 10_000])
async def test_frames_come_in_any_pieces(size: int) -> None:
    connection, heard, wire = made()
    stream = connection.call(GENERATE, b"request")
    wire.written = b""
    messages = [b"one", b"", b"three" * 9]
    data = b"".join(b"\x00" + len(message).to_bytes(4, "big") + message for message in messages)
    trailers = b"\x00\x0bgrpc-status\x01\x30"
    text = (
        frame(SETTINGS, 0, 0, b"")
        + frame(HEADERS, 4, stream, b"\x88")
        + frame(DATA, 0, stream, data[:9])
        + frame(PING, 0, 0, b"12345678")
        + frame(DATA, 0, stream, data[9:])
        + frame(HEADERS, 4 | END_STREAM, stream, trailers)
    )
    for start in range(0, len(text), size):
        connection.data_received(text[start : start + size])
    assert heard.messages == {stream: messages}
    assert heard.ends == {stream: "0"}
    assert wire.written == frame(SETTINGS, ACK, 0, b"") + frame(PING, ACK, 0, b"12345678")


async def test_each_call_ends_once_whatever_happens() -> None:
    connection, heard, wire = made()
    first, second, third = (connection.call(GENERATE, b"") for _ in range(3))
    connection.data_received(frame(RST_STREAM, 0, first, bytes(4)) * 2 + frame(DATA, END_STREAM, second, b""))
    connection.data_received(frame(DATA, 0, first, b"\x00\x00\x00\x00\x00") + frame(GOAWAY, 0, 0, bytes(8)))
    assert wire.is_closed
    connection.connection_lost(None)
    connection.close()
    assert heard.ends == {first: "1", second: UNAVAILABLE, third: UNAVAILABLE}
    assert not heard.messages
    assert status_of(b"\x88") == UNAVAILABLE


async def test_no_more_is_sent_than_the_server_takes() -> None:
    connection, _, wire = made()
    connection.call(GENERATE, bytes(60_000))
    sent = len(wire.written)
    connection.call(GENERATE, bytes(10_000))
    assert len(wire.written) == sent > 60_000
    connection.data_received(frame(WINDOW_UPDATE, 0, 0, (20_000).to_bytes(4, "big")))
    assert len(wire.written) > sent + 10_000


async def test_a_stream_of_requests_larger_than_its_window() -> None:
    """A server that counts what it reads, and so opens its windows again."""

    async def echo(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while (message := await context.read()) is not grpc.aio.EOF:
            assert isinstance(message, bytes)
            await context.write(len(message).to_bytes(4, "big"))

    server = grpc.aio.server()
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    heard = Heard()
    connection = await Http2.connect(f"127.0.0.1:{port}", heard)
    stream = connection.open("/test/Echo")
    sizes = [1, 8_000, *([16_000] * 50)]
    for size in sizes:
        connection.send(stream, b"x" * size)
    async with asyncio.timeout(10.0):
        while len(heard.messages.get(stream, [])) < len(sizes):
            heard.has_news.clear()
            await heard.has_news.wait()
    assert heard.messages[stream] == [size.to_bytes(4, "big") for size in sizes]
    connection.close()
    assert heard.ends == {stream: CANCELLED}
    await server.stop(None)
