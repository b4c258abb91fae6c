"""The front door: health, reflection, models, status, drain and stop."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from octavo.v1 import model_service_pb2 as models_pb
from octavo.v1 import status_service_pb2 as status_pb
from octavo.v1 import types_pb2 as types
from octavo.v1.model_service_pb2_grpc import ModelServiceStub
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

from router.config import RouterConfig
from router.model import ServedModel
from router.server import SERVICES, RouterServer
from router.tokenizer import Tokenizer
from tests.router.rig import (
    END,
    MAX_MODEL_LEN,
    VOCAB_SIZE,
    FakeBackend,
    Rig,
    answering,
    byte_tokenizer,
    eventually,
    running,
    served_model,
    text_request,
)
from workers.errors import ModelFileError, StartupError
from workers.types import ModelFiles

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(rig: Rig, service: str = "") -> int:
    stub = health_pb2_grpc.HealthStub(rig.channel)
    answer: Any = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return int(answer.status)


async def test_health(rig: Rig) -> None:
    for service in ("", *SERVICES):
        assert await health(rig, service) == SERVING
    await rig.server.health.set_serving(False)
    for service in ("", *SERVICES):
        assert await health(rig, service) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await health(rig, "octavo.v1.Unknown")
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection(rig: Rig) -> None:
    async def requests() -> Any:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol="octavo.v1.InferenceService")

    call: Any = reflection_pb2_grpc.ServerReflectionStub(rig.channel).ServerReflectionInfo(requests())
    answers = [answer async for answer in call]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {*SERVICES, "grpc.health.v1.Health"} <= names
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_list_models(rig: Rig) -> None:
    stub: Any = ModelServiceStub(rig.channel)
    (model,) = (await stub.ListModels(models_pb.ListModelsRequest())).models
    assert (model.name, model.max_model_len, model.vocab_size) == ("toy", MAX_MODEL_LEN, VOCAB_SIZE)
    assert (list(model.eos_token_ids), model.has_chat_template, list(model.capabilities)) == ([END], True, ["generate"])
    assert (model.model_fingerprint, model.tokenizer_fingerprint) == ("m", "t")


@pytest.mark.parametrize(
    ("told", "known"),
    [
        ([], ["generate"]),
        ([("toy", "connecting", "pool"), ("toy", "draining", "pool"), ("other", "ready", "pool")], ["generate"]),
        ([("toy", "ready", "logprobs"), ("toy", "ready", "logit_bias")], ["generate", "logit_bias", "logprobs"]),
    ],
)
async def test_a_model_can_what_its_connected_replicas_say(
    rig: Rig, told: list[tuple[str, str, str]], known: list[str]
) -> None:
    """Without any, what every engine can."""
    [view] = rig.backend.views
    rig.backend.views = [
        replace(view, model=model, state=state, capabilities=frozenset({"generate", capability}))
        for model, state, capability in told
    ]
    stub: Any = ModelServiceStub(rig.channel)
    (model,) = (await stub.ListModels(models_pb.ListModelsRequest())).models
    assert list(model.capabilities) == known


async def test_tokenize_and_detokenize(rig: Rig) -> None:
    stub: Any = ModelServiceStub(rig.channel)
    made = await stub.Tokenize(models_pb.TokenizeRequest(prompt=types.Prompt(text="héllo")))
    assert (bytes(made.token_ids).decode(), made.max_model_len) == ("héllo", MAX_MODEL_LEN)
    chat = types.ChatMessage(role="user", content=[types.ContentPart(text="x")])
    prompt = types.Prompt(messages=types.ChatMessages(messages=[chat]))
    made = await stub.Tokenize(models_pb.TokenizeRequest(model="toy", prompt=prompt))
    assert list(made.token_ids) == [257, *b"user:x", 257]

    ids = [*"héllo".encode(), END]
    assert (await stub.Detokenize(models_pb.DetokenizeRequest(token_ids=ids))).text == "héllo"
    request = models_pb.DetokenizeRequest(token_ids=ids, skip_special_tokens=False)
    assert (await stub.Detokenize(request)).text == "héllo<|end|>"


@pytest.mark.parametrize(
    ("method", "request_", "code", "reason"),
    [
        ("Tokenize", models_pb.TokenizeRequest(model="x"), "NOT_FOUND", b"MODEL_NOT_FOUND"),
        ("Tokenize", models_pb.TokenizeRequest(), "INVALID_ARGUMENT", b"EMPTY_PROMPT"),
        ("Detokenize", models_pb.DetokenizeRequest(model="x"), "NOT_FOUND", b"MODEL_NOT_FOUND"),
        ("Detokenize", models_pb.DetokenizeRequest(token_ids=[260]), "INVALID_ARGUMENT", b"TOKEN_ID_OUT_OF_RANGE"),
    ],
    ids=str,
)
async def test_what_the_model_service_refuses(rig: Rig, method: str, request_: Any, code: str, reason: bytes) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await getattr(ModelServiceStub(rig.channel), method)(request_)
    assert error.value.code().name == code
    assert reason in dict(error.value.trailing_metadata())["grpc-status-details-bin"]


async def test_status(rig: Rig) -> None:
    stub: Any = StatusServiceStub(rig.channel)
    rig.backend.script = answering("x")
    async with rig.open_session() as session:
        await session.start("a", text_request())
        await session.outcome("a")
        await rig.generate(text_request(max_tokens=-1))
        status = await stub.GetStatus(status_pb.GetStatusRequest())
    router = status.router
    assert (status.version, router.id, router.state, router.num_sessions) == ("0.0", "router-1", "serving", 1)
    assert (router.num_accepted_total, router.num_ended_total) == (1, 1)
    assert (router.num_queued_requests, router.num_queued_tokens, router.max_queued_tokens) == (1, 2, 4)
    assert router.num_running_requests == 3
    (replica,) = status.replicas
    assert (replica.id, replica.model, replica.state, replica.pid) == ("r1", "toy", "ready", 7)
    assert (replica.num_preemptions, replica.num_drafted_tokens, replica.num_accepted_tokens) == (1, 9, 5)


async def test_drain(way: str, rig: Rig) -> None:
    """Health first, nothing new, running ones to their end."""
    async with rig.open_session() as session:
        await session.start("running", text_request())
        work = await rig.backend.work()
        drain = asyncio.create_task(rig.server.drain(5))
        await session.until(lambda: session.go_away is not None)
        assert session.go_away is not None
        assert (session.go_away.grace.seconds, session.go_away.reason) == (5, "DRAINING")
        assert await health(rig) == NOT_SERVING
        refused = await rig.run(way, text_request())
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert not drain.done()
        work.emit("done")
        work.finish()
        assert (await session.outcome("running")).text == "done"
        assert await drain
        await rig.server.stop()
        await session.read()
        assert session.is_over


async def test_clients_of_a_router_that_has_a_successor_find_it_at_once() -> None:
    """The same port, the same channel: what runs ends where it is, what is asked next goes to the successor. While the
    one that drained kept its port, half of all new connections reached it, and on old ones every call was refused."""
    backend, successor = FakeBackend(), FakeBackend()
    successor.script = answering("new")
    first, second = (
        RouterServer(RouterConfig(), {"toy": served_model()}, each, router_id=name, version="0.0", so_reuseport=True)
        for each, name in ((backend, "first"), (successor, "second"))
    )
    port = first.bind("127.0.0.1", 0)
    await first.start()
    old = Rig(first, backend, f"127.0.0.1:{port}")
    async with old.open_session() as session:
        await session.start("running", text_request())
        call = asyncio.create_task(old.generate(text_request()))
        works = [await backend.work(i) for i in range(2)]
        second.bind("127.0.0.1", port)
        await second.start()
        drain = asyncio.create_task(first.drain(60, has_successor=True))
        await session.until(lambda: session.go_away is not None)
        for _ in range(20):
            new = Rig(second, successor, old.address)
            assert (await old.generate(text_request())).text == "new"
            assert (await new.session(text_request())).text == "new"
            await new.channel.close()
        for work in works:
            work.emit("old")
            work.finish()
        assert (await session.outcome("running")).text == "old"
        assert (await call).text == "old"
        assert await drain
        await first.stop()
    assert len(backend.works) == 2
    await old.channel.close()
    await second.stop()


async def test_a_client_may_attach_to_a_router_that_drains(rig: Rig) -> None:
    async with rig.open_session() as first:
        await first.start("a", text_request())
        work = await rig.backend.work()
        first.call.cancel()
        await eventually(lambda: rig.server.sessions.num_open == 0)
    drain = asyncio.create_task(rig.server.drain(5))
    async with rig.open_session() as second:
        await second.attach("a")
        work.emit("x")
        work.finish()
        assert (await second.outcome("a")).text == "x"
        assert second.go_away is not None
        assert await drain


async def test_stop_ends_what_the_drain_left(rig: Rig) -> None:
    call = rig.stub.Generate(text_request(), timeout=10)
    async with rig.open_session() as session:
        await session.start("a", text_request())
        works = [await rig.backend.work(i) for i in range(2)]
        assert not await rig.server.drain(0.1)
        await rig.server.stop()
        outcome = await session.outcome("a")
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert await call.code() == grpc.StatusCode.UNAVAILABLE
        assert "stopping" in await call.details()
        assert all(work.is_cancelled for work in works)
    await rig.assert_nothing_left()


async def test_a_port_in_use() -> None:
    async with running() as rig:
        port = int(rig.address.rpartition(":")[2])
        second = RouterServer(RouterConfig(), {"toy": served_model()}, FakeBackend(), router_id="2", version="0")
        with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{port}: the port is in use"):
            second.bind("127.0.0.1", port)
        await second.stop()


async def test_several_ports_and_shared_ones() -> None:
    def make() -> RouterServer:
        models = {"toy": served_model()}
        return RouterServer(RouterConfig(), models, FakeBackend(), router_id="2", version="0", so_reuseport=True)

    first, second = make(), make()
    port = first.bind("127.0.0.1", 0)
    own_port = first.bind("127.0.0.1", 0)
    assert second.bind("127.0.0.1", port) == port != own_port
    await first.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{own_port}") as channel:
        answer: Any = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == SERVING
    await first.stop()
    await second.stop()


def write_files(folder: Path) -> ModelFiles:
    files = ModelFiles(
        weights=folder / "weights",
        tokenizer_json=folder / "tokenizer.json",
        chat_template=folder / "template.jinja",
        manifest=folder / "manifest.json",
    )
    byte_tokenizer().save(str(files.tokenizer_json))
    files.manifest.write_text(served_model().manifest.to_json())
    assert files.chat_template is not None
    files.chat_template.write_text("{{ eos_token }}{{ messages[0].content }}")
    return files


def test_a_model_from_files(tmp_path: Path) -> None:
    model = ServedModel.from_files(write_files(tmp_path))
    assert model.manifest == served_model().manifest
    assert model.chat_template is not None
    assert model.chat_template.render([{"role": "user", "content": "hi"}]) == "<|end|>hi"


@pytest.mark.parametrize("way", ["generate", "session"])
async def test_the_length_that_the_engines_are_set_up_for_counts(tmp_path: Path, way: str) -> None:
    """engine.max_model_len below the manifest's: refused by the router, before and without any replica."""
    model = ServedModel.from_files(write_files(tmp_path), max_model_len=20)
    async with running({"toy": model}) as rig:
        stub = ModelServiceStub(rig.channel)
        listed: Any = await stub.ListModels(models_pb.ListModelsRequest())
        assert [each.max_model_len for each in listed.models] == [20]
        outcome = await rig.run(way, text_request("x" * 12, max_tokens=9))
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
        assert "must be <= 20, the model's context, is 9" in outcome.violations["max_tokens"]
        assert rig.backend.works == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("manifest.json", None, "cannot read"),
        ("manifest.json", "{}", "is not a manifest"),
        ("manifest.json", json.dumps([1]), "is not a manifest"),
        ("tokenizer.json", None, "is not a readable tokenizer.json"),
        ("tokenizer.json", '{"model": 1}', "is not a readable tokenizer.json"),
        ("template.jinja", None, "cannot read"),
        ("template.jinja", "{% for", "does not compile"),
        ("template.jinja", "x" * 1_000_001, "at most 1000000 characters"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    files = write_files(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelFileError, match=words):
        ServedModel.from_files(files)


async def test_long_texts_are_tokenized_in_a_thread() -> None:
    tokenizer = Tokenizer(byte_tokenizer())
    short, long = "x" * 100, "x" * 5_000
    assert await tokenizer.encode_text(short) == list(short.encode())
    assert await tokenizer.encode_text(long) == list(long.encode())
    assert await tokenizer.decode(list(long.encode())) == long
