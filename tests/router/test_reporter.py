"""A router's reports, what it makes of the answers, and what its status and health say of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.v1 import status_service_pb2 as status_pb
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

from router.model import UnservedModel
from router.outlook import LastOutlook
from router.reporter import Reporter
from router.signal import ModelOutlook, ModelSignal, Outlook, RouterReport, StartingReplica
from tests.router.rig import Rig, eventually, running, served_model

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
OTHER = RouterReport(router_id="router-0", epoch=1, pid=5, address="h:1", own_address="h:2", node_id="n")


def outlook(target: int = 2, **fields: Any) -> Outlook:
    model = ModelOutlook(target=target, min_replicas=0, max_replicas=4, reason="why", decided_at=7.0, **fields)
    return Outlook(models={"toy": model}, routers=(OTHER,))


class Line:
    """A signal that answers what the test says."""

    def __init__(self) -> None:
        self.reports: list[RouterReport] = []
        self.answer: Outlook | Exception = outlook()

    async def report(self, report: RouterReport) -> Outlook:
        self.reports.append(report)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with running({"toy": served_model(), "lost": UnservedModel("no file")}) as rig:
        yield rig


async def status(rig: Rig) -> status_pb.GetStatusResponse:
    stub: Any = StatusServiceStub(rig.channel)
    found: status_pb.GetStatusResponse = await stub.GetStatus(status_pb.GetStatusRequest())
    return found


async def health(rig: Rig, model: str) -> int:
    stub = health_pb2_grpc.HealthStub(rig.channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=f"octavo.model/{model}"))
    return int(answer.status)


async def test_reports_go_on_whatever_the_signal_answers(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    line, num_after = Line(), 0

    async def after() -> None:
        nonlocal num_after
        num_after += 1

    about = rig.server.about
    reporter = Reporter(line, about, after=after, period_s=0.01)
    reporter.start()
    await eventually(lambda: about.outlook.model("toy") is not None)
    for answer in (ConnectionError("nobody is there"), TimeoutError("nobody answers"), ValueError("ours")):
        line.answer, count = answer, len(line.reports)
        await eventually(lambda count=count: len(line.reports) >= count + 3)  # type: ignore[misc]
    line.answer = outlook(target=3)
    await eventually(lambda: (found := about.outlook.model("toy")) is not None and found.target == 3)
    await reporter.stop()
    count = len(line.reports)
    await asyncio.sleep(0.03)
    assert len(line.reports) == count
    assert num_after >= count - 1
    assert len([record for record in caplog.records if "stays as it is" in record.message]) == 1
    report = line.reports[0]
    assert (report.router_id, report.state, report.num_queued_tokens) == ("router-1", "serving", 2)
    assert report.models["toy"] == ModelSignal(num_queued=1, num_aboard=3, num_ready=1, num_turned_away_total=2)


async def test_a_late_answer_makes_no_reports_pile_up(rig: Rig) -> None:
    class SlowLine(Line):
        num_open = most_open = 0

        async def report(self, report: RouterReport) -> Outlook:
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
            await asyncio.sleep(0.1)
            self.num_open -= 1
            return await super().report(report)

    line = SlowLine()
    reporter = Reporter(line, rig.server.about, after=rig.server.health.refresh, period_s=0.01)
    reporter.start()
    await eventually(lambda: len(line.reports) >= 3)
    await reporter.stop()
    assert line.most_open == 1


async def test_an_outlook_grows_old() -> None:
    now = 100.0
    last = LastOutlook(lambda: now)
    assert (last.model("toy"), last.routers, last.overrides) == (None, (), {})
    last.heard(outlook(ready_in_s=1.0, override=2))
    now = 100.4
    found = last.model("toy")
    assert found is not None
    assert found.ready_in_s == pytest.approx(0.6)
    now = 101.9
    found = last.model("toy")
    assert found is not None
    assert found.ready_in_s == 0
    assert last.routers == (OTHER,)
    now = 102.1
    assert (last.model("toy"), last.routers) == (None, ())
    assert last.overrides == {"toy": 2}  # for an actor that has restarted


async def test_the_status_says_what_was_heard(rig: Rig) -> None:
    start = StartingReplica(replica_id="r9", stage="loading", since_s=1.5, node_id="n", pid=8)
    rig.server.about.outlook.heard(outlook(override=2, demand=12.5, start_s=3.0, starting=(start,), failure=""))
    found = await status(rig)
    toy, lost = found.models
    assert (toy.name, toy.num_ready, toy.num_queued, toy.num_running, toy.num_turned_away_total) == ("toy", 1, 1, 3, 2)
    assert (toy.has_outlook, toy.target, toy.min_replicas, toy.max_replicas) == (True, 2, 0, 4)
    assert (toy.reason, toy.decided_at, toy.override, toy.demand, toy.start_s) == ("why", 7.0, 2, 12.5, 3.0)
    assert not toy.HasField("ready_in_s")
    assert (lost.failure, lost.has_outlook) == ("no file", False)
    assert [router.id for router in found.routers] == ["router-0", "router-1"]
    other = found.routers[0]
    assert (other.pid, other.address, other.own_address, other.node_id) == (5, "h:1", "h:2", "n")
    assert found.routers[1].max_queued_tokens == found.router.max_queued_tokens == 4
    ready, starting = found.replicas
    assert (ready.id, ready.state) == ("r1", "ready")
    assert (starting.id, starting.state, starting.detail, starting.pid) == ("r9", "starting", "loading", 8)
    assert starting.starting_s == 1.5


async def test_without_a_signal_the_status_says_what_the_router_knows(rig: Rig) -> None:
    found = await status(rig)
    assert not found.models[0].has_outlook
    assert [router.id for router in found.routers] == ["router-1"]
    assert len(found.replicas) == 1


async def test_health_of_models(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (await health(rig, "toy"), await health(rig, "lost")) == (SERVING, NOT_SERVING)
    monkeypatch.setattr(rig.backend, "signal", lambda model: ModelSignal())
    await rig.server.health.refresh()
    assert await health(rig, "toy") == NOT_SERVING
    for heard, expected in (
        (outlook(target=0), SERVING),
        (outlook(target=0, failure="no memory"), NOT_SERVING),
        (outlook(target=1), NOT_SERVING),
    ):
        rig.server.about.outlook.heard(heard)
        await rig.server.health.refresh()
        assert await health(rig, "toy") == expected
    await rig.server.health.set_serving(False)
    rig.server.about.outlook.heard(outlook(target=0))
    await rig.server.health.refresh()
    assert await health(rig, "toy") == NOT_SERVING
