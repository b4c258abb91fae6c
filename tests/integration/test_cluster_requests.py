"""Requests through a whole cluster: client, router, data plane, replica and back."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from octavo.internal.v1 import data_plane_pb2
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub
from octavo.names import Span

from cluster.boot import forwarded
from cluster.model_fake import VOCAB_SIZE
from cluster.processes import descendants
from tests.cluster import ClusterProcess
from tests.collector import Collector
from tests.integration.calls import (
    Session,
    await_status,
    connected,
    generate,
    has_ready,
    request,
    status,
)
from workers.fake import fake_continuation

pytestmark = pytest.mark.cluster


async def test_answers_are_those_of_the_engine_over_generate_and_session(fake_cluster: ClusterProcess) -> None:
    prompts = {f"r{n}": [n, *range(3, 3 + 5 * n)] for n in range(1, 9)}
    async with connected(fake_cluster.address) as channel, Session(channel) as session:
        await session.start({name: request(prompt, 40) for name, prompt in prompts.items()})
        single = await asyncio.gather(*(generate(channel, request(prompt, 40)) for prompt in prompts.values()))
        await session.end()
    for prompt, alone, shared in zip(prompts.values(), single, session.answers.values(), strict=True):
        expected = fake_continuation(prompt, 40, VOCAB_SIZE)
        assert (alone.code, alone.tokens) == (grpc.StatusCode.OK, expected)
        assert (shared.code, shared.tokens) == (grpc.StatusCode.OK, expected)


async def test_both_replicas_work(fake_cluster: ClusterProcess) -> None:
    async with connected(fake_cluster.address) as channel:
        found = await await_status(channel, has_ready(2))
        answers = await asyncio.gather(*(generate(channel, request([n] * 50, 30)) for n in range(3, 35)))
    assert {answer.replica for answer in answers} == {replica.id for replica in found.replicas}


async def test_what_was_announced_is_what_runs(fake_cluster: ClusterProcess) -> None:
    ready = fake_cluster.ready
    assert ready["models"] == ["fake"]
    assert ready["pid"] == fake_cluster.process.pid
    assert len({replica["id"] for replica in ready["replicas"]}) == 2
    async with connected(fake_cluster.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(service="octavo.v1.InferenceService"), timeout=10)
        found = await status(channel)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert found.version == ready["version"]


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
async def test_replicas_have_the_variables_that_they_need(fake_cluster: ClusterProcess) -> None:
    async with connected(fake_cluster.address) as channel:  # others may have killed those that were there first
        pids = [replica.pid for replica in (await await_status(channel, has_ready(2))).replicas]
    for pid in pids:
        variables = (Path("/proc") / str(pid) / "environ").read_text().split("\0")
        assert {f"{name}={value}" for name, value in forwarded({}).items()} <= set(variables)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_a_ray_of_our_own_runs_nothing_that_serves_nobody(fake_cluster: ClusterProcess) -> None:
    commands = []
    for process in descendants(fake_cluster.process.pid):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            commands.append((Path("/proc") / str(process.pid) / "cmdline").read_text())
    assert any("raylet" in command for command in commands)
    for useless in ("log_monitor.py", "monitor.py", "dashboard.py", "SecretKeeper"):
        # Ray's agents stand in the raylet's command line, too, and the dashboard's is one of them.
        assert not any(useless in command.partition("--")[0] for command in commands)


async def test_a_stranger_gets_nothing_at_the_data_port(fake_cluster: ClusterProcess) -> None:
    async with connected(fake_cluster.address) as channel:
        found = await await_status(channel, has_ready(2))
    async with connected(found.replicas[0].address) as channel:
        call = DataPlaneServiceStub(channel).Attach(timeout=10)  # type: ignore[call-arg]  # the stubs know the sync form
        challenge = (await call.read()).challenge
        assert len(challenge.nonce) == 32
        hello = data_plane_pb2.Hello(
            protocol=challenge.max_protocol, router_id="stranger", router_epoch=1, proof=secrets.token_bytes(32)
        )
        await call.write(data_plane_pb2.AttachRequest(hello=hello))
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("way", ["Generate", "Session"])
async def test_one_trace_joins_client_router_and_replica(
    fake_cluster: ClusterProcess, collector: Collector, way: str
) -> None:
    prompt = list(range(3, 40))
    with collector.client_span("ask") as (trace_id, span_id, traceparent):
        async with connected(fake_cluster.address) as channel:
            if way == "Generate":
                answer = await generate(channel, request(prompt, 5), metadata={"traceparent": traceparent})
            else:
                async with Session(channel) as session:
                    await session.start({"traced": request(prompt, 5)}, traceparent=traceparent)
                    await session.end()
                    answer = session.answers["traced"]
    assert answer.code is grpc.StatusCode.OK
    server = Span.GENERATE if way == "Generate" else Span.SESSION_REQUEST
    spans = collector.await_spans(trace_id, {"ask", server, Span.QUEUE, Span.DISPATCH, Span.PREFILL, Span.DECODE})
    assert spans["ask"].service == "octavo-client"
    assert spans[server].parent_id == span_id
    assert {spans[name].service for name in (server, Span.QUEUE, Span.DISPATCH)} == {"octavo-router"}
    assert {spans[name].service for name in (Span.PREFILL, Span.DECODE)} == {"octavo-worker"}
    assert {spans[name].parent_id for name in (Span.QUEUE, Span.DISPATCH)} == {spans[server].span_id}
    assert {spans[name].parent_id for name in (Span.PREFILL, Span.DECODE)} == {spans[Span.DISPATCH].span_id}
