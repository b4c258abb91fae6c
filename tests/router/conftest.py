"""One running router's front for each test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.router.rig import Rig, running


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running() as rig:
        yield rig


@pytest.fixture(params=["generate", "session"])
def way(request: pytest.FixtureRequest) -> str:
    """Both ways in which a request comes."""
    return str(request.param)
