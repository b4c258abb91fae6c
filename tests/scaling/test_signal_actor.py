"""The actor's class, without Ray: when it answers, and what it tells of each change."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import pytest

from cluster import signal_actor
from cluster.autoscaling import ScalingConfig
from cluster.signal_actor import SignalActor
from router.signal import ModelSignal, RouterReport

SCALING = dataclasses.asdict(ScalingConfig(max_replicas=5, upscale_delay_s=0.1).of_replicas(1, 10))
SCALING["schedule"] = []  # JSON knows no tuples


class Telemetry:
    metrics_address = "http://127.0.0.1:9/metrics"


class Boot:
    def start_process(self, role: str) -> Any:
        assert role == "signal"
        return Telemetry()


def report(num_queued: int) -> RouterReport:
    return RouterReport(router_id="a", epoch=1, models={"toy": ModelSignal(num_queued=num_queued)})


@pytest.fixture
async def actor() -> SignalActor:
    return SignalActor(Boot())  # type: ignore[arg-type]


async def test_a_question_is_answered_as_soon_as_there_is_something_new(
    actor: SignalActor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(signal_actor, "HOLD_S", 60.0)
    caplog.set_level(logging.INFO)
    asked = asyncio.create_task(actor.desired("toy", SCALING, 1, 1))
    await asyncio.sleep(0.01)
    await actor.report(report(0))
    await asyncio.sleep(0.01)
    assert not asked.done()
    outlook = await actor.report(report(25))
    assert outlook.models["toy"].target == 1
    assert await asyncio.wait_for(asked, 30) == 3  # after the delay, with no other report
    assert (await actor.view()).models["toy"].target == 3
    assert await actor.desired("toy", SCALING, 1, 1) == 3  # who has not heard yet is told at once
    assert [record.message for record in caplog.records] == [
        "toy: 3 replicas, were 1: 25.0 sequences, 10 a replica (0 running, 25 waiting)"
    ]


async def test_without_news_it_is_answered_after_a_while(actor: SignalActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_actor, "HOLD_S", 0.05)
    assert await actor.desired("toy", SCALING, 1, 2) == 2


async def test_an_operator_is_heard_at_once(actor: SignalActor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal_actor, "HOLD_S", 60.0)
    asked = asyncio.create_task(actor.desired("toy", SCALING, 1, 1))
    await asyncio.sleep(0.01)
    await actor.scale("toy", 4)
    assert await asyncio.wait_for(asked, 30) == 4


async def test_nodes_are_counted_off_the_loop_once_a_second(
    actor: SignalActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = iter([3, 5])
    monkeypatch.setattr(signal_actor, "_count_nodes", lambda: next(counts))
    monkeypatch.setattr(signal_actor, "NODES_PERIOD_S", 60.0)
    assert [await actor.num_nodes() for _ in range(3)] == [3, 3, 3]
