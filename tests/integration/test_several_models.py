"""Several models in one cluster: each with replicas of its own, and those that fail leave the others alone."""

from __future__ import annotations

import asyncio
import os
import signal
import urllib.request
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from octavo.client import Client, NotFoundError
from octavo.names import Reason
from octavo.v1.inference_service_pb2 import GenerateRequest
from octavo.v1.model_service_pb2 import ListModelsRequest
from octavo.v1.model_service_pb2_grpc import ModelServiceStub
from octavo.v1.status_service_pb2 import GetStatusResponse

from cluster.model_fake import VOCAB_SIZE
from tests.cluster import ClusterProcess, running
from tests.integration.calls import Answer, await_status, connected, generate, is_idle, request
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster

CONFIG = """
model = "fake"
[router]
drain_grace_s = 2
[replicas]
health_check_period_s = 1
[engine]
engine = "fake"
num_blocks = 1024

[models.quick]
[models.slow]
[models.slow.engine]
fake_step_s = 0.02
[models.missing]  # routers do not find its files, and no replica tries
model = "nothing.gguf"
replicas.num_replicas = 0
scaling = {min_replicas = 0, max_replicas = 1}
[models.unfit.engine]  # its replicas find no weights
engine = "paged"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    file = tmp_path_factory.mktemp("several") / "cluster.toml"
    file.write_text(CONFIG)
    with running("--config", str(file)) as cluster:
        yield cluster


def asked(model: str, prompt: list[int], max_tokens: int) -> GenerateRequest:
    message = request(prompt, max_tokens)
    message.model = model
    return message


async def health(channel: grpc.aio.Channel, model: str) -> int:
    request = HealthCheckRequest(service=f"octavo.model/{model}")
    response: HealthCheckResponse = await HealthStub(channel).Check(request)
    return response.status


def assert_answered(answer: Answer, prompt: list[int], max_tokens: int) -> None:
    assert (answer.code, answer.details) == (grpc.StatusCode.OK, "")
    assert answer.tokens == fake_continuation(prompt, max_tokens, VOCAB_SIZE)


def replicas_of(model: str, found: GetStatusResponse) -> list[int]:
    return [replica.pid for replica in found.replicas if replica.model == model and replica.state == "ready"]


async def test_a_cluster_gets_ready_with_the_models_that_can_be_served(cluster: ClusterProcess) -> None:
    assert cluster.ready["models"] == ["quick", "slow"]
    assert "nothing.gguf" in cluster.ready["failures"]["missing"]
    assert sorted(cluster.ready["failures"]) == ["missing", "unfit"]
    prompt = [7] * 20
    async with connected(cluster.address) as channel:
        listed = await ModelServiceStub(channel).ListModels(ListModelsRequest())
        assert [model.name for model in listed.models] == ["quick", "slow", "unfit"]
        for model in ("quick", "slow"):
            assert_answered(await generate(channel, asked(model, prompt, 30)), prompt, 30)
            assert await health(channel, model) == HealthCheckResponse.SERVING
        found = await await_status(channel, lambda found: all(model.failure for model in found.models[2:]))
        for model in found.models[2:]:
            failed = await generate(channel, asked(model.name, prompt, 30))
            assert failed.code is grpc.StatusCode.UNAVAILABLE
            assert failed.details == f"model {model.name} cannot be served: {model.failure}"
            assert model.failure == cluster.ready["failures"][model.name]
            assert await health(channel, model.name) == HealthCheckResponse.NOT_SERVING


async def test_a_client_has_to_name_the_model(cluster: ClusterProcess) -> None:
    async with Client(cluster.address) as client:
        with pytest.raises(NotFoundError, match="missing, quick, slow, unfit") as refused:
            await client.generate([5] * 8, max_tokens=4).complete()
        assert refused.value.reason == Reason.MODEL_NOT_FOUND


async def test_the_loss_of_one_models_replicas_leaves_streams_of_others_alone(cluster: ClusterProcess) -> None:
    prompts = [[n] * 20 for n in range(3, 11)]
    async with connected(cluster.address) as channel:
        before = await await_status(channel, lambda found: len(replicas_of("quick", found)) == 1)
        begun = asyncio.Semaphore(0)
        calls = [
            asyncio.create_task(generate(channel, asked("slow", prompt, 100), on_tokens=begun.release))
            for prompt in prompts
        ]
        for _ in prompts:
            await begun.acquire()
        victims = replicas_of("quick", before)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for call, prompt in zip(calls, prompts, strict=True):
            assert_answered(await call, prompt, 100)
        assert replicas_of("slow", before) == replicas_of("slow", await await_status(channel, lambda _: True))
        assert_answered(await generate(channel, asked("quick", prompts[0], 30)), prompts[0], 30)
        assert victims != replicas_of("quick", await await_status(channel, is_idle))


def test_replicas_are_told_apart_as_requests_call_their_models(cluster: ClusterProcess) -> None:
    """Though all of them have the same files."""
    with urllib.request.urlopen(cluster.ready["metrics"], timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    of_replicas = [line for line in lines if line.startswith("octavo_engine_steps_total{")]
    assert {line.partition('gen_ai_request_model="')[2].partition('"')[0] for line in of_replicas} == {"quick", "slow"}
