"""Ask a running cluster: ``python examples/python_client.py [HOST:PORT]``."""

import asyncio
import sys

from octavo.client import Client


async def main(address: str = "127.0.0.1:50051") -> None:
    async with Client(address) as client:
        async for delta in client.generate("The capital of France is", max_tokens=16, temperature=0):
            print(delta.text, end="", flush=True)
        print()


asyncio.run(main(*sys.argv[1:2]))
