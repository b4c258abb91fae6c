"""Several models in one cluster: each with replicas of its own, and those that fail leave the others alone."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest
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
[models.missing]  # neither routers nor replicas find its files
model = "nothing.gguf"
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


def assert_answered(answer: Answer, prompt: list[int], max_tokens: int) -> None:
    assert (answer.code, answer.details) == (grpc.StatusCode.OK, "")
    assert answer.tokens == fake_continuation(prompt, max_tokens, VOCAB_SIZE)


def replicas_of(model: str, found: GetStatusResponse) -> list[int]:
    return [replica.pid for replica in found.replicas if replica.model == model and replica.state == "ready"]


async def test_a_cluster_gets_ready_with_the_models_that_can_be_served(cluster: ClusterProcess) -> None:
    assert cluster.ready["models"] == ["quick", "slow"]
    assert "nothing.gguf" in cluster.ready["failures"]["missing"]
    assert list(cluster.ready["failures"]) == ["missing", "unfit"]
    prompt = [7] * 20
    async with connected(cluster.address) as channel:
        listed = await ModelServiceStub(channel).ListModels(ListModelsRequest())
        assert {"quick", "slow"} <= {model.name for model in listed.models}
        for model in ("quick", "slow"):
            answer = await generate(channel, asked(model, prompt, 30))
            assert_answered(answer, prompt, 30)
            assert f"Worker-{model}" in answer.replica or answer.replica
        failed = await generate(channel, asked("missing", prompt, 30))
        assert failed.code is grpc.StatusCode.UNAVAILABLE
        assert failed.details.startswith("model missing cannot be served: ")
        assert "nothing.gguf" in failed.details


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
            answer = await call
            assert_answered(answer, prompt, 100)
            assert answer.usage is not None
        assert replicas_of("slow", before) == replicas_of("slow", await await_status(channel, lambda _: True))
        assert_answered(await generate(channel, asked("quick", prompts[0], 30)), prompts[0], 30)
        assert victims != replicas_of("quick", await await_status(channel, is_idle))
