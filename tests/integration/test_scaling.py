"""A cluster that has as many replicas as its load needs, none included: one after the other, on one cluster."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.names import Attribute, Span
from octavo.v1.status_service_pb2 import GetStatusResponse, ModelStatus

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import ClusterProcess, marked, running
from tests.collector import Collector
from tests.integration.calls import Answer, await_status, connected, generate, is_idle, request, status
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster
PLACES = 2


@pytest.fixture(scope="module")
def cluster(collector: Collector) -> Iterator[ClusterProcess]:
    """Up to two replicas for two sequences each, and none after two seconds without a request."""
    with running(
        *("--model", "fake", "--engine", "fake"),
        OCTAVO_REPLICAS__NUM_REPLICAS="0",
        OCTAVO_SCALING__MIN_REPLICAS="0",
        OCTAVO_SCALING__MAX_REPLICAS="2",
        OCTAVO_SCALING__DOWNSCALE_DELAY_S="3",
        OCTAVO_SCALING__ZERO_DELAY_S="2",
        OCTAVO_ENGINE__MAX_NUM_SEQUENCES=str(PLACES),
        OCTAVO_ENGINE__FAKE_STEP_S="0.02",
        OCTAVO_ENGINE__FAKE_LOAD_S="1",
        OCTAVO_ROUTER__DRAIN_GRACE_S="5",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.endpoint,
        OTEL_BSP_SCHEDULE_DELAY="200",
    ) as cluster:
        yield cluster


def model(found: GetStatusResponse) -> ModelStatus:
    (only,) = found.models
    return only


async def health(channel: grpc.aio.Channel) -> int:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="octavo.model/fake"), timeout=10)
    return int(answer.status)


def assert_right(answer: Answer, prompt: list[int], num_tokens: int) -> None:
    assert answer.code is grpc.StatusCode.OK, answer.details
    assert answer.tokens == fake_continuation(prompt, num_tokens, VOCAB_SIZE)


async def test_the_first_request_starts_the_first_replica(cluster: ClusterProcess) -> None:
    assert cluster.ready["replicas"] == []
    async with connected(cluster.address) as channel:
        found = await await_status(channel, lambda found: model(found).has_outlook)
        assert (model(found).target, model(found).min_replicas, model(found).max_replicas) == (0, 0, 2)
        assert [router.own_address for router in found.routers] == cluster.ready["routers"]
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING
        waiting = asyncio.create_task(generate(channel, request([5, 6], 20), timeout_s=60))
        found = await await_status(channel, lambda found: [each.state for each in found.replicas] == ["starting"])
        assert not waiting.done()
        assert (model(found).target, model(found).num_queued) == (1, 1)
        assert "1.0 sequences" in model(found).reason
        assert found.replicas[0].detail in ("starting", "fetching", "loading", "warming")
        assert found.replicas[0].starting_s > 0
        assert_right(await waiting, [5, 6], 20)
        found = await await_status(channel, lambda found: model(found).num_ready == 1 and model(found).start_s > 0)
        assert [each.state for each in found.replicas] == ["ready"]


async def test_a_backlog_adds_replicas_and_its_end_takes_them_away(cluster: ClusterProcess) -> None:
    async with connected(cluster.address) as channel:
        prompts = [[7, number] for number in range(24)]
        asked = [asyncio.create_task(generate(channel, request(prompt, 60))) for prompt in prompts]
        found = await await_status(channel, lambda found: model(found).target == 2)
        assert model(found).num_queued > 0
        assert "running" in model(found).reason
        await await_status(channel, lambda found: model(found).num_ready == 2)
        for prompt, answer in zip(prompts, await asyncio.gather(*asked), strict=True):
            assert_right(answer, prompt, 60)
        await await_status(channel, is_idle)
        found = await await_status(channel, lambda found: model(found).target == 0 and not found.replicas)
        assert model(found).reason == "no request in 2 s"
        assert await health(channel) == health_pb2.HealthCheckResponse.SERVING


async def test_who_cannot_wait_for_a_start_is_refused_at_once_but_begins_one(cluster: ClusterProcess) -> None:
    async with connected(cluster.address) as channel:
        found = await await_status(channel, lambda found: model(found).target == 0 and not found.replicas)
        assert model(found).start_s > 1.0
        answer = await generate(channel, request([5], 5), timeout_s=0.8 * model(found).start_s)
        assert answer.code is grpc.StatusCode.UNAVAILABLE
        assert "no replica is ready" in answer.details
        await await_status(channel, lambda found: model(found).target == 1)
        assert model(await status(channel)).num_turned_away_total >= 1


async def test_the_actor_may_die(cluster: ClusterProcess) -> None:
    """Requests go on without it, and its successor takes over what is there."""
    async with connected(cluster.address) as channel:
        asked = asyncio.create_task(generate(channel, request([9], 200)))
        found = await await_status(channel, lambda found: model(found).num_ready == 1 and model(found).num_running == 1)
        decided_at = model(found).decided_at
        (pid,) = (pid for pid, command in marked(cluster.mark).items() if "SignalActor" in command)
        os.kill(pid, signal.SIGKILL)
        found = await await_status(
            channel, lambda found: model(found).has_outlook and model(found).decided_at != decided_at
        )
        assert (model(found).target, model(found).reason) == (1, "as it was started")
        assert_right(await asked, [9], 200)


async def test_each_decision_is_a_span(cluster: ClusterProcess, collector: Collector) -> None:
    del cluster  # of which all spans have come by now but perhaps the last; other clusters' come here, too
    spans = [span for span in collector.named(Span.SCALE) if span.attributes[Attribute.REQUEST_MODEL] == "fake"]
    steps = [(span.attributes[Attribute.REPLICAS_BEFORE], span.attributes[Attribute.REPLICAS_TARGET]) for span in spans]
    wanted = [(0, 1), (1, 2), (2, 1), (1, 0)]
    start = next(i for i in range(len(steps)) if steps[i : i + 4] == wanted)
    assert "running" in spans[start + 1].attributes[Attribute.SCALE_REASON]
    assert {span.service for span in spans} == {"octavo-signal"}
