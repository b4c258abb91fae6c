"""A scripted router per test, and the promise that no test leaves a task behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from octavo.client import Backoff, Client, ClientOptions

from tests.client.scripted_router import ScriptedRouter

FAST_BACKOFF = Backoff(first_s=0.005, max_s=0.02)


@pytest.fixture
async def router() -> AsyncIterator[ScriptedRouter]:
    router = ScriptedRouter()
    await router.start()
    yield router
    await router.stop()


@pytest.fixture
async def other_router() -> AsyncIterator[ScriptedRouter]:
    router = ScriptedRouter()
    await router.start()
    yield router
    await router.stop()


@pytest.fixture
async def make_client() -> AsyncIterator[Callable[..., Client]]:
    """Returns clients that retry fast; afterwards no task of theirs may be left."""

    def make(*targets: str, **options: object) -> Client:
        defaults: dict[str, object] = {"backoff": FAST_BACKOFF, "retry_timeout_s": 5.0, "close_timeout_s": 0.5}
        return Client(targets, options=ClientOptions(**{**defaults, **options}))  # type: ignore[arg-type]

    yield make
    left = [task.get_name() for task in asyncio.all_tasks() if task.get_name().startswith("octavo-")]
    assert not left, f"tasks left behind: {left}"


@pytest.fixture
async def client(router: ScriptedRouter, make_client: Callable[..., Client]) -> AsyncIterator[Client]:
    async with make_client(router.address) as client:
        yield client
