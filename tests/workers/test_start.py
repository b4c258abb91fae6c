"""How far a replica's start has come."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from workers import start as module
from workers.build import warm
from workers.config import EngineConfig
from workers.fake import FakeEngine
from workers.start import FAILED, FETCHING, LOADING, PACKING, READY, STARTING, WARMING, Start


class Heard:
    """A `Progress` that remembers, and blocks for a moment as one that calls somebody may."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.ages: list[float] = []
        self.details: list[str] = []
        self.threads: set[int] = set()
        self.ended = threading.Event()

    def __call__(self, replica_id: str, stage: str, *, age_s: float, detail: str) -> None:
        assert replica_id == "r"
        self.stages.append(stage)
        self.ages.append(age_s)
        self.details.append(detail)
        self.threads.add(threading.get_ident())
        if stage in (READY, FAILED):
            self.ended.set()

    async def end(self) -> None:
        assert await asyncio.to_thread(self.ended.wait, 30)


async def test_stages_are_told_in_order_off_the_loop() -> None:
    heard = Heard()
    start = Start("r", heard)
    async with start.told():
        for stage in (FETCHING, LOADING):
            start.reach(stage)
        await asyncio.to_thread(start.reach, PACKING)
        start.reach(WARMING)
    await heard.end()
    assert heard.stages == [STARTING, FETCHING, LOADING, PACKING, WARMING, READY]
    assert sorted(heard.ages) == heard.ages
    assert 0 <= heard.ages[0] <= module.MAX_STORED_S + 1
    assert len(heard.threads) == 1
    assert threading.get_ident() not in heard.threads


async def test_a_long_stage_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.01)
    heard = Heard()
    start = Start("r", heard)
    async with start.told():
        start.reach(LOADING)
        while heard.stages.count(LOADING) < 3:  # noqa: ASYNC110  told in another thread
            await asyncio.sleep(0.005)
    await heard.end()
    num_told = len(heard.stages)
    await asyncio.sleep(0.05)
    assert len(heard.stages) == num_told


@pytest.mark.parametrize(("error", "detail"), [(RuntimeError("no memory"), "no memory"), (ValueError(), "ValueError")])
async def test_a_start_that_fails_says_why(error: Exception, detail: str) -> None:
    heard = Heard()
    with pytest.raises(type(error)):
        async with Start("r", heard).told():
            raise error
    await heard.end()
    assert (heard.stages, heard.details[-1]) == ([STARTING, FAILED], detail)


def test_a_warm_engine_has_nothing_on_its_hands() -> None:
    engine = FakeEngine(EngineConfig(engine="fake", num_blocks=8))
    warm(engine)
    load: Any = engine.load()
    assert (load.num_running, load.num_waiting, load.num_free_blocks, load.num_computed_tokens) == (0, 0, 8, 1)
    assert engine.drain_outputs() == []
    assert engine.kv_events() == []
