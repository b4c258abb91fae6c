"""Drives a server that speaks OpenAI's `/v1/completions` with token ids as prompts, streamed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import aiohttp

from load_tests.measurement import AskError, Sample
from load_tests.sse import EventDecoder

TIMEOUT_S = 1200.0
DONE = "[DONE]"


class CompletionsDriver:
    """Used as ``async with CompletionsDriver(url, model="m") as driver``."""

    def __init__(self, url: str, *, model: str) -> None:
        self._url = url
        self._model = model
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A connection each: llama-server closes one after a stream, which the next request would find out too late.
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S), connector=aiohttp.TCPConnector(limit=0, force_close=True)
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def ask(self, prompt: Sequence[int], num_tokens: int) -> Sample:
        assert self._session is not None
        body = {
            "model": self._model,
            "prompt": list(prompt),
            "max_tokens": num_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin = time.perf_counter()
        first, usage = None, None
        try:
            async with self._session.post(f"{self._url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise AskError(f"{response.status}: {(await response.text())[:300]}")
                decoder = EventDecoder()
                async for piece in response.content.iter_any():
                    for data in decoder.feed(piece):
                        if data == DONE:
                            continue
                        event = json.loads(data)
                        if first is None and event.get("choices"):
                            first = time.perf_counter()
                        usage = event.get("usage") or usage
        except (aiohttp.ClientError, TimeoutError) as error:
            raise AskError(f"{type(error).__name__}: {error}") from error
        end = time.perf_counter()
        if first is None or usage is None:
            raise AskError("the stream ended without a token or without its usage")
        return Sample(
            first_token_s=first - begin,
            total_s=end - begin,
            num_tokens=usage["completion_tokens"],
            num_cached=_cached(usage),
        )


def _cached(usage: Mapping[str, Any]) -> int | None:
    details = usage.get("prompt_tokens_details")
    return details.get("cached_tokens") if details else None
