"""Requests with a trace context of their own, over Session and over Generate, and what their usage says."""

from __future__ import annotations

import random
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pydoc_data.topics import topics

import grpc.aio
from octavo.client import Client
from octavo.names import Metadata
from octavo.v1 import types_pb2
from octavo.v1.inference_service_pb2 import GenerateRequest
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from load_tests.trace_trees import Answer

TIMEOUT_S = 300.0
_TEXT = " ".join(topics[name] for name in sorted(topics))
"""The manual of Python: every Python has it."""


class Asker:
    """Asks a cluster at `address`; made by `asking`. Prompts follow from `seed`."""

    def __init__(self, client: Client, stub: InferenceServiceStub, seed: int) -> None:
        self._client = client
        self._stub = stub
        self._random = random.Random(seed)

    async def ask(self, way: str, *, characters: int, num_tokens: int) -> Answer:
        """Have some text continued by at most `num_tokens`, over "session" or "generate". Raises what the client or
        gRPC raise for a request that is not answered."""
        start = self._random.randrange(len(_TEXT) - characters)
        prompt, trace_id, parent_id = _TEXT[start : start + characters], secrets.token_hex(16), secrets.token_hex(8)
        traceparent = f"00-{trace_id}-{parent_id}-01"
        if way == "session":
            completion = await self._client.complete(
                prompt, max_tokens=num_tokens, traceparent=traceparent, timeout=TIMEOUT_S
            )
            usage = completion.usage
        else:
            usage = await self._generate(prompt, num_tokens, traceparent)
        assert usage is not None
        return Answer(trace_id, parent_id, usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens)

    async def _generate(self, prompt: str, num_tokens: int, traceparent: str) -> types_pb2.Usage | None:
        request = GenerateRequest(prompt=types_pb2.Prompt(text=prompt), max_tokens=num_tokens)
        usage = None
        async for message in self._stub.Generate(
            request, timeout=TIMEOUT_S, metadata=((Metadata.TRACEPARENT, traceparent),)
        ):
            if message.HasField("usage"):
                usage = message.usage
        return usage


@asynccontextmanager
async def asking(address: str, seed: int = 1) -> AsyncIterator[Asker]:
    async with Client(address) as client, grpc.aio.insecure_channel(address) as channel:
        yield Asker(client, InferenceServiceStub(channel), seed)
