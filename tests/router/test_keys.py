"""Bearer tokens: who is let in, what a token's tenant gets, and what happens when the key file changes."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest
from octavo.client import Client, ClientOptions
from octavo.names import Reason
from octavo.v1 import model_service_pb2, status_service_pb2
from octavo.v1.model_service_pb2_grpc import ModelServiceStub
from octavo.v1.status_service_pb2_grpc import StatusServiceStub

from router import key_file
from router.key_file import KeyFile
from router.keyring import Keyring, Terms
from tests.router.rig import Outcome, Rig, answering, eventually, running, text_request
from workers.errors import OverloadedError

WRITTEN_TO_ENDED = "Internal error from Core"
"""What gRPC's own client says instead of the status when it writes at the moment in which that comes."""
WAYS = pytest.mark.parametrize("way", ["generate", "session"])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def new_key(path: Path, tenant: str, *, expires_at: float | None = None) -> tuple[str, str]:
    """Return a new key's id and token."""
    made = []

    def edit(keyring: Keyring) -> Keyring:
        keyring, key, token = keyring.with_key(tenant, time.time(), expires_at=expires_at)
        made.append((key.key_id, token))
        return keyring

    key_file.change(path, edit)
    return made[0]


def set_terms(path: Path, tenant: str, terms: Terms) -> None:
    key_file.change(path, lambda keyring: keyring.with_terms(tenant, terms))


def keys_of(rig: Rig) -> KeyFile:
    assert rig.server.keys is not None
    return rig.server.keys


def refresh(rig: Rig) -> None:
    """Do now what is done once a second, and may just have been done."""
    keys = keys_of(rig)
    keys.refresh()
    assert keys.keyring == key_file.read(keys._path)


async def send(rig: Rig, way: str, *authorizations: str) -> Outcome:
    metadata = [("authorization", text) for text in authorizations]
    rig.backend.script = answering("ok")
    if way == "generate":
        return await rig.generate(text_request(), metadata=metadata)
    outcome = await _send_by_session(rig, metadata)
    while outcome.message == WRITTEN_TO_ENDED:
        outcome = await _send_by_session(rig, metadata)
    return outcome


async def _send_by_session(rig: Rig, metadata: list[tuple[str, str]]) -> Outcome:
    async with rig.open_session(metadata=metadata) as session:
        try:
            await session.start("s", text_request())
            return await session.outcome("s")
        except grpc.aio.AioRpcError:  # what a failed write says is not what the router said
            return Outcome(await session.call.code(), message=await session.call.details())


@WAYS
async def test_a_token_says_who_calls(path: Path, way: str) -> None:
    _, token = new_key(path, "acme")
    async with running(keys_file=str(path)) as rig:
        assert (await send(rig, way, f"Bearer {token}")).code is grpc.StatusCode.OK
        assert rig.backend.works[-1].request.tenant == "acme"
        assert rig.backend.works[-1].request.salt


@WAYS
@pytest.mark.parametrize(
    "authorizations",
    [
        [],
        ["Basic eDp5"],
        ["Bearer "],
        ["Bearer octavo_00000000_" + "0" * 64],
        ["Bearer {id}"],
        ["Bearer {token}x"],
        ["{token}"],
        ["Bearer {token}", "Bearer {token}"],
    ],
)
async def test_nobody_else_is_let_in(path: Path, way: str, authorizations: list[str]) -> None:
    key_id, token = new_key(path, "acme")
    async with running(keys_file=str(path)) as rig:
        outcome = await send(rig, way, *(text.format(id=key_id, token=token) for text in authorizations))
        assert outcome.code is grpc.StatusCode.UNAUTHENTICATED
        assert "authorization" in outcome.message
        assert token not in outcome.message
        assert not rig.backend.works
        await rig.assert_nothing_left()


async def test_other_services_need_a_token_too_and_health_does_not(path: Path) -> None:
    _, token = new_key(path, "acme")
    async with running(keys_file=str(path)) as rig:
        metadata = [("authorization", f"Bearer {token}")]
        models, status = ModelServiceStub(rig.channel), StatusServiceStub(rig.channel)
        for call, request in (
            (models.ListModels, model_service_pb2.ListModelsRequest()),
            (models.Tokenize, model_service_pb2.TokenizeRequest()),
            (models.Detokenize, model_service_pb2.DetokenizeRequest(token_ids=[65])),
            (status.GetStatus, status_service_pb2.GetStatusRequest()),
            (status.GetRequestRecord, status_service_pb2.GetRequestRecordRequest(id="a")),
            (status.ListRequestRecords, status_service_pb2.ListRequestRecordsRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call(request)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert (await models.ListModels(model_service_pb2.ListModelsRequest(), metadata=metadata)).models
        async with Client(rig.address) as client:
            assert await client.health()


@WAYS
async def test_a_revoked_or_expired_key_ends_at_once(path: Path, way: str) -> None:
    key_id, token = new_key(path, "acme")
    _, old = new_key(path, "acme", expires_at=time.time() - 1)
    async with running(keys_file=str(path)) as rig:
        assert (await send(rig, way, f"Bearer {token}")).code is grpc.StatusCode.OK
        outcome = await send(rig, way, f"Bearer {old}")
        assert outcome.code is grpc.StatusCode.UNAUTHENTICATED
        assert "has expired" in outcome.message
        key_file.change(path, lambda keyring: keyring.without(key_id, time.time()))
        refresh(rig)
        outcome = await send(rig, way, f"Bearer {token}")
        assert outcome.code is grpc.StatusCode.UNAUTHENTICATED
        assert "was revoked" in outcome.message


async def test_a_session_that_is_open_when_its_key_is_revoked_starts_nothing_more(path: Path) -> None:
    key_id, token = new_key(path, "acme")
    async with running(keys_file=str(path)) as rig:
        rig.backend.script = answering("ok")
        async with rig.open_session(metadata=[("authorization", f"Bearer {token}")]) as session:
            await session.start("before", text_request())
            assert (await session.outcome("before")).code is grpc.StatusCode.OK
            key_file.change(path, lambda keyring: keyring.without(key_id, time.time()))
            refresh(rig)
            await session.start("after", text_request())
            outcome = await session.outcome("after")
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.UNAUTHENTICATED, Reason.KEY_REVOKED)


async def test_a_new_key_is_good_without_a_restart_and_a_broken_file_changes_nothing(path: Path) -> None:
    _, first = new_key(path, "acme")
    async with running(keys_file=str(path)) as rig:
        key_id, second = new_key(path, "other")
        await eventually(lambda: key_id in keys_of(rig).keyring.keys)
        assert (await send(rig, "generate", f"Bearer {second}")).code is grpc.StatusCode.OK
        await asyncio.to_thread(path.write_text, "{")
        assert not keys_of(rig).refresh()
        for token in (first, second):
            assert (await send(rig, "generate", f"Bearer {token}")).code is grpc.StatusCode.OK


async def test_only_tenants_of_one_group_share_a_salt(path: Path) -> None:
    tokens = {tenant: new_key(path, tenant)[1] for tenant in ("a", "b", "c", "g")}
    for tenant in ("a", "b"):
        set_terms(path, tenant, Terms(group="g"))
    async with running(keys_file=str(path)) as rig:
        salts = {}
        for tenant, token in tokens.items():
            assert (await send(rig, "generate", f"Bearer {token}")).code is grpc.StatusCode.OK
            salts[tenant] = rig.backend.works[-1].request.salt
        assert salts["a"] == salts["b"]
        assert len({salts["a"], salts["c"], salts["g"]}) == 3, "a tenant with a group's name is not in it"


async def test_a_session_that_is_open_when_a_tenant_leaves_its_group_shares_no_longer(path: Path) -> None:
    """It shared what it cached for as long as it lived."""
    _, token = new_key(path, "a")
    set_terms(path, "a", Terms(group="g"))
    async with running(keys_file=str(path)) as rig:
        rig.backend.script = answering("ok")
        metadata = [("authorization", f"Bearer {token}")]
        async with rig.open_session(metadata=metadata) as session:
            for request_id in ("before", "within", "after"):
                if request_id == "after":
                    set_terms(path, "a", Terms())
                    refresh(rig)
                await session.start(request_id, text_request())
                assert (await session.outcome(request_id)).code is grpc.StatusCode.OK
        assert (await send(rig, "generate", f"Bearer {token}")).code is grpc.StatusCode.OK
        before, within, after, anew = (work.request.salt for work in rig.backend.works)
        assert before == within != after == anew


@WAYS
async def test_a_quota_is_told_with_the_time_to_come_again(path: Path, way: str) -> None:
    _, token = new_key(path, "acme")
    set_terms(path, "acme", Terms(requests_per_minute=2))
    async with running(keys_file=str(path)) as rig:
        for _ in range(2):
            assert (await send(rig, way, f"Bearer {token}")).code is grpc.StatusCode.OK
        outcome = await send(rig, way, f"Bearer {token}")
        assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUOTA_EXCEEDED)
        assert outcome.retry_after_s == pytest.approx(30, abs=2)
        await rig.assert_nothing_left()


async def test_a_request_that_finds_the_queue_full_costs_nothing(path: Path) -> None:
    """Each took one of the requests of a minute, so that who tried again had none left when there was room."""
    _, token = new_key(path, "acme")
    set_terms(path, "acme", Terms(requests_per_minute=2, tokens_per_minute=1_000))
    async with running(keys_file=str(path)) as rig:
        rig.backend.refusal = OverloadedError("the queue is full")
        for _ in range(3):
            outcome = await send(rig, "generate", f"Bearer {token}")
            assert (outcome.code, outcome.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.QUEUE_FULL)
        rig.backend.refusal = None
        for _ in range(2):
            assert (await send(rig, "generate", f"Bearer {token}")).code is grpc.StatusCode.OK
        await rig.assert_nothing_left()


async def test_tokens_are_charged_by_what_was_used(path: Path) -> None:
    _, token = new_key(path, "acme")
    set_terms(path, "acme", Terms(tokens_per_minute=80))
    async with running(keys_file=str(path)) as rig:
        for _ in range(5):  # each may use 64 tokens, and uses 4
            assert (await send(rig, "generate", f"Bearer {token}")).code is grpc.StatusCode.OK


async def test_the_client_library_sends_a_token(path: Path) -> None:
    _, token = new_key(path, "acme")
    async with running(keys_file=str(path)) as rig:
        rig.backend.script = answering("ok")
        options = ClientOptions(metadata=(("authorization", f"Bearer {token}"),))
        async with Client(rig.address, options=options) as client:
            assert (await client.complete("hi")).text == "ok"
            assert await client.list_models()
        assert rig.backend.works[-1].request.tenant == "acme"
