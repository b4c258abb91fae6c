"""The process that passes bytes on, beside which routers are measured."""

from __future__ import annotations

import asyncio

import grpc

from load_tests.rigs.byte_proxy import ByteProxy


async def test_messages_go_both_ways_until_the_client_leaves() -> None:
    is_over = asyncio.Event()

    async def echo(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                assert isinstance(message, bytes)
                await context.write(message * 2)
        finally:
            is_over.set()

    server = grpc.aio.server()
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with ByteProxy(f"127.0.0.1:{port}") as proxy:
        async with grpc.aio.insecure_channel(proxy.address) as channel:
            call = channel.stream_stream("/test/Echo")()
            for message in (b"a", b"b" * 1_000):
                await call.write(message)
                assert await asyncio.wait_for(call.read(), 10.0) == message * 2
            call.cancel()
            await asyncio.wait_for(is_over.wait(), 10.0)
    await server.stop(None)
