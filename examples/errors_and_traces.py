"""Follow a request, and tell errors apart: ``python examples/errors_and_traces.py [HOST:PORT]``.

The trace id that it prints is what `octavo trace` and a tracing back end know the request by.
"""

import asyncio
import secrets
import sys

from octavo.client import Client
from octavo.client.errors import CallError


async def main(address: str = "127.0.0.1:50051") -> None:
    async with Client(address) as client:
        # Within a process that traces with OpenTelemetry the client takes the current context by itself.
        trace_id = secrets.token_hex(16)
        traceparent = f"00-{trace_id}-{secrets.token_hex(8)}-01"
        async for delta in client.generate("Once upon a time", max_tokens=16, traceparent=traceparent):
            print(delta.text, end="", flush=True)
        print(f"\ntrace {trace_id}")
        try:
            await client.generate("Hi", temperature=-1).complete()
        except CallError as error:
            print(f"{error.code.name} {error.reason}, try again: {'yes' if error.retryable else 'no'}")
            for violation in error.field_violations:
                print(f"  {violation.field}: {violation.description}")


asyncio.run(main(*sys.argv[1:2]))
