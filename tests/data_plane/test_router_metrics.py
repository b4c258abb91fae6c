"""Every metric that a router has is recorded by what really happens, with bounded labels."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml
from octavo import metrics as table
from octavo.client import CallError, DeadlineExceededError, NotFoundError
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2 as types
from octavo.v1.inference_service_pb2_grpc import InferenceServiceStub

from router import gauges
from router.config import ObserverConfig
from router.gauges import RouterGauges
from router.metrics import RouterMetrics
from tests.data_plane.rig import Replica, until
from tests.data_plane.whole_router import MODEL, Meters, WholeRouter, whole_router

ALERTS = Path(__file__).parents[2] / "deploy/observability/alerts.yml"
PROMPT = list(range(1, 41))


@pytest.fixture
def step_s() -> float:
    return 0.002


@pytest.fixture
async def router(step_s: float) -> AsyncIterator[WholeRouter]:
    async with whole_router([Replica("one", fake_step_s=step_s)]) as router:
        yield router


async def test_a_request_that_went_well(router: WholeRouter) -> None:
    meters = router.meters
    for _ in range(2):
        await router.client.complete(PROMPT, max_tokens=20)
    await until(lambda: meters.value("octavo.requests") == 2)
    for name in (
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
        "octavo.request.queue.duration",
        "octavo.request.prefill.duration",
        "octavo.request.decode.duration",
        "octavo.tenant.queue.duration",
    ):
        assert meters.value(name) == 2, name
    assert meters.value("octavo.requests", model=MODEL) == 2
    assert meters.value("octavo.requests", type="CANCELLED") == 0
    assert meters.value("octavo.choices.finished", model=MODEL, reason="length") == 2
    assert meters.value("octavo.tokens", model=MODEL, type="input") == 80
    assert meters.value("octavo.tokens", model=MODEL, type="cached") == 39  # of the second, all but the last one
    assert meters.value("octavo.tokens", model=MODEL, type="output") == 40
    assert meters.value("octavo.tenant.requests", tenant="none") == 2
    assert meters.value("octavo.tenant.tokens", tenant="none", type="output") == 40
    assert meters.value("octavo.batch.requests", model=MODEL) == 2
    assert meters.value("octavo.batch.tokens", model=MODEL) == 2
    assert meters.value("octavo.placements", model=MODEL, rule="only") == 2
    assert meters.value("octavo.placement.matched_tokens", model=MODEL) == 36
    (duration,) = meters.points("gen_ai.server.request.duration").values()
    assert 0.08 < duration.sum < 5  # twenty steps of 2 ms each
    (per_token,) = meters.points("gen_ai.server.time_per_output_token").values()
    assert 0.002 < per_token.sum < 0.2
    (first,) = meters.points("gen_ai.server.time_to_first_token").values()
    assert first.sum < duration.sum


async def test_what_alerts_count_is_there_before_it_happens(router: WholeRouter) -> None:
    """Else the first failures of a kind would be no increase to Prometheus, and fire nothing."""
    failures = {dict(labels).get("error.type") for labels in router.meters.points("octavo.requests")}
    rules = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    (counted,) = (rule["expr"] for rule in rules if rule["record"] == "octavo:failures:rate5m")
    assert failures == set(re.search(r'error_type=~"([^"]+)"', counted)[1].split("|"))
    for name in ("octavo.deadline.misses", "octavo.resumes"):
        assert router.meters.points(name), name
        assert router.meters.value(name) == 0


@pytest.mark.parametrize("step_s", [0.02])
async def test_how_it_stands_now(router: WholeRouter) -> None:
    meters = router.meters
    await router.client.complete(PROMPT, max_tokens=4)
    assert meters.value("octavo.replicas", model=MODEL, state="ready") == 1
    assert {dict(labels)["octavo.replica.state"] for labels in meters.points("octavo.replicas")} == {
        "starting",
        "connecting",
        "ready",
        "draining",
        "refused",
    }
    assert meters.value("octavo.sessions") == 1
    await until(lambda: meters.value("octavo.prefix_index.blocks", model=MODEL) == 10)
    assert meters.value("octavo.credit.tokens", model=MODEL) > 0
    # More than it has places for: the rest waits.
    running = [asyncio.create_task(router.client.complete([n] * 30, max_tokens=900)) for n in range(1, 61)]
    await until(lambda: meters.value("octavo.queue.requests", model=MODEL) > 0)
    assert meters.value("octavo.queue.tokens", model=MODEL) >= 30
    await until(lambda: meters.value("octavo.queue.oldest", model=MODEL) > 0.01)
    assert meters.value("octavo.requests.dispatched", model=MODEL) > 0
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await until(lambda: meters.value("octavo.requests", type="CANCELLED") == 60)
    assert meters.value("octavo.rejections") == 0


async def test_gauges_answer_from_another_thread(router: WholeRouter) -> None:
    """A reader that serves a port collects in a thread of its own, while the loop runs."""
    assert await asyncio.to_thread(router.meters.value, "octavo.replicas", state="ready") == 1


async def test_gauges_of_a_busy_loop_show_what_was_last(router: WholeRouter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader waits once for a loop that is busy with something long, not once for each gauge."""
    asked: list[RouterGauges] = []
    ask = RouterGauges._ask

    def asking(told: RouterGauges, loop: asyncio.AbstractEventLoop) -> None:
        asked.append(told)
        ask(told, loop)

    assert router.meters.value("octavo.credit.tokens") > 0
    await asyncio.sleep(2 * gauges.MAX_AGE_S)
    monkeypatch.setattr(RouterGauges, "_ask", asking)
    with ThreadPoolExecutor(1) as threads:
        # The loop is busy until the reader has an answer.
        (point,) = threads.submit(router.meters.points, "octavo.credit.tokens").result(60).values()
    assert point.value > 0
    assert 1 <= len(asked) <= 3  # once, unless this machine takes its time from one gauge to the next


async def test_what_is_refused(router: WholeRouter) -> None:
    meters, client = router.meters, router.client
    for name in ("nobody", "another", "a third"):
        with pytest.raises(NotFoundError):
            await client.complete(PROMPT, model=name)
    with pytest.raises(CallError):
        await client.complete(PROMPT, temperature=-1.0)
    await until(lambda: meters.value("octavo.requests") == 4)
    assert meters.value("octavo.rejections", model="unknown", type="MODEL_NOT_FOUND") == 3
    assert meters.value("octavo.rejections", model=MODEL, type="INVALID_FIELD") == 1
    assert meters.value("octavo.requests", model="unknown") == 3
    models = {
        dict(labels).get("gen_ai.request.model") for name in table.CATALOGUE for labels in meters.points(name.name)
    }
    assert models <= {MODEL, "unknown", None}
    assert meters.value("octavo.deadline.misses") == 0
    assert meters.value("octavo.request.queue.duration") == 0


async def test_a_full_queue_is_a_rejection() -> None:
    async with whole_router([], max_queued_requests=2) as router:
        waiting = [asyncio.create_task(router.client.complete([n] * 8, timeout=20)) for n in range(1, 3)]
        await until(lambda: router.dispatcher.backlog().num_queued_requests == 2)
        with pytest.raises(grpc.aio.AioRpcError, match="2 requests"):
            await router.ask(9)
        assert router.meters.value("octavo.rejections", model=MODEL, type="QUEUE_FULL") == 1
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def test_a_deadline_that_passes_after_the_request_was_queued() -> None:
    async with whole_router([]) as router:
        assert await router.client.health()
        with pytest.raises(DeadlineExceededError):
            await router.client.complete(PROMPT, timeout=1.0)
        await until(lambda: router.meters.value("octavo.deadline.misses") == 1)
        assert router.meters.value("octavo.deadline.misses", model=MODEL, type="DEADLINE_PASSED") == 1
        assert router.meters.value("octavo.rejections") == 0
        assert router.meters.value("octavo.request.queue.duration") == 0  # it never went anywhere


async def test_an_answer_that_goes_on_elsewhere() -> None:
    one, two = Replica("one", fake_step_s=0.005), Replica("two", fake_step_s=0.005)
    async with whole_router([one, two]) as router:
        answers = [asyncio.create_task(router.client.complete([n] * 8, max_tokens=400)) for n in range(1, 9)]
        await until(lambda: router.meters.value("octavo.requests.dispatched") == 8)
        await asyncio.sleep(0.05)
        await one.kill()
        for answer in await asyncio.gather(*answers):
            assert len(answer.token_ids) == 400
        await until(lambda: router.meters.value("octavo.requests") == 8)
        num_lost = router.meters.value("octavo.resumes", model=MODEL, type="REPLICA_LOST")
        assert 1 <= num_lost <= 8
        assert router.meters.value("octavo.placements") == 8 + num_lost
        assert router.meters.value("octavo.tokens", type="output") == 3_200


async def test_tenants_have_series_up_to_a_number() -> None:
    meters = Meters()
    observer = ObserverConfig(max_tenants=2)
    async with whole_router([Replica("one")], observer=observer, meters=meters, tenant_header="x-tenant") as router:
        for tenant in ("acme", "beta", "gamma", "delta", "acme"):
            await router.ask(5, ("x-tenant", tenant))
        await until(lambda: meters.value("octavo.tenant.requests") == 5)
        for name in ("octavo.tenant.requests", "octavo.tenant.queue.duration"):
            by_tenant = {tenant: meters.value(name, tenant=tenant) for tenant in ("acme", "beta", "other")}
            assert by_tenant == {"acme": 2, "beta": 1, "other": 2}, name
        assert meters.value("octavo.tenant.tokens", tenant="other", type="output") == 4


async def test_calls_and_starts_that_never_become_requests_are_rejections() -> None:
    async with whole_router([Replica("one", fake_step_s=0.002)], tenant_header="x-tenant") as router:
        with pytest.raises(grpc.aio.AioRpcError):
            await router.ask(5, ("x-tenant", "one"), ("x-tenant", "another"))
        assert router.meters.value("octavo.rejections", model=MODEL, type="INVALID_FIELD") == 1
        async with grpc.aio.insecure_channel(router.address) as channel:
            call = InferenceServiceStub(channel).Session()
            asked = pb.GenerateRequest(prompt=types.Prompt(token_ids=types.TokenIds(ids=[5])), max_tokens=900)
            start = pb.Start(request_id="a", request=asked)
            await call.write(pb.SessionRequest(starts=[start, start]))
            await until(lambda: router.meters.value("octavo.rejections", type="REQUEST_ID_IN_USE") == 1)
            call.cancel()
        assert router.meters.value("octavo.requests") == 0


async def test_every_metric_of_a_router_is_there(router: WholeRouter) -> None:
    """Those that nothing has happened for among them, once their like has."""
    await router.client.complete(PROMPT, max_tokens=4)
    await router.client.complete(PROMPT, max_tokens=4)
    with pytest.raises(NotFoundError):
        await router.client.complete(PROMPT, model="nobody")
    await until(lambda: router.meters.value("octavo.requests") == 3)
    others = {table.DEADLINE_MISSES, table.RESUMES, table.SILENT_PROCESSES}  # the last one is made in `cluster`
    expected = {metric.name for metric in table.CATALOGUE if metric.where == "router" and metric not in others}
    assert {name for name in expected if not router.meters.points(name)} == set()
    for metric in table.CATALOGUE:
        for labels in router.meters.points(metric.name):
            assert set(dict(labels)) <= set(metric.attributes), metric.name


def test_who_names_no_model_counts_for_the_only_one_there_is() -> None:
    for models, expected in ((["a"], "a"), (["a", "b"], "unknown")):
        meters = Meters()
        RouterMetrics(meters.meter, models, max_tenants=0).refused("", "DRAINING")
        assert meters.value("octavo.rejections", type="DRAINING", model=expected) == 1
