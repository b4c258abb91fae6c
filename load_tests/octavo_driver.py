"""Drives a cluster over gRPC, as a microservice with `octavo.client` would."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from octavo.client import CallError, Client

from load_tests.measurement import AskError, Sample


class OctavoDriver:
    """Used as ``async with OctavoDriver("127.0.0.1:50051") as driver``."""

    def __init__(self, address: str) -> None:
        self._client = Client(address)

    async def __aenter__(self) -> Self:
        await self._client.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._client.close()

    async def ask(self, prompt: Sequence[int], num_tokens: int) -> Sample:
        begin = time.perf_counter()
        first = None
        token_ids: list[int] = []
        generation = self._client.generate(prompt, max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        try:
            async for delta in generation:
                if first is None and delta.token_ids:
                    first = time.perf_counter()
                token_ids += delta.token_ids
        except CallError as error:
            raise AskError(f"{type(error).__name__}: {error}") from error
        end = time.perf_counter()
        usage = generation.usage
        if first is None or usage is None:
            raise AskError("the answer ended without a token or without its usage")
        return Sample(
            first_token_s=first - begin,
            total_s=end - begin,
            num_tokens=usage.generated_tokens,
            num_cached=usage.cached_tokens,
            token_ids=tuple(token_ids),
        )
