"""Calls for numbers as a router counts them: quotas, tenants, drain, metrics and records; the back is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import grpc
import pytest
from octavo.client import (
    CallError,
    Client,
    ClientOptions,
    DeadlineExceededError,
    ResourceExhaustedError,
    UnavailableError,
)
from octavo.names import Reason

from cluster.trace_view import parts
from router.config import ObserverConfig
from router.keyring import Terms
from router.metrics import RouterMetrics
from router.observer import RequestObserver
from router.pool_call import MAX_KEPT_ATTEMPTS
from tests.data_plane.whole_router import Meters
from tests.router.rig import Rig, Work, eventually, running
from tests.router.test_keys import new_key, set_terms
from workers.errors import OverloadedError

TEN = "ten bytes."


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def client_of(rig: Rig, token: str = "") -> Client:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    return Client(rig.address, options=ClientOptions(metadata=metadata, retry_timeout_s=0.01))


def answer(work: Work) -> None:
    work.dispatch()
    work.sink.pooled(0, [0.5, float(len(work.request.prompt))])
    work.finish()


async def refusal(call: Awaitable[Any]) -> CallError:
    with pytest.raises(CallError) as caught:
        await call
    return caught.value


async def test_a_call_is_one_request_and_all_its_tokens(path: Path) -> None:
    _, token = new_key(path, "acme")
    set_terms(path, "acme", Terms(requests_per_minute=3, tokens_per_minute=50))
    async with running(keys_file=str(path)) as rig, client_of(rig, token) as client:
        rig.backend.script = answer
        await client.embed([TEN] * 2)
        await client.embed([TEN] * 3)
        error = await refusal(client.embed([TEN]))
        assert isinstance(error, ResourceExhaustedError)
        assert error.reason == Reason.QUOTA_EXCEEDED
        assert len(rig.backend.works) == 5


@pytest.mark.parametrize("way", ["cancel", "deadline"])
async def test_what_was_not_sent_to_a_replica_is_given_back(path: Path, way: str) -> None:
    _, token = new_key(path, "acme")
    set_terms(path, "acme", Terms(tokens_per_minute=40))
    async with running(keys_file=str(path)) as rig, client_of(rig, token) as client:
        asking = asyncio.create_task(client.embed([TEN] * 4, timeout=1.0 if way == "deadline" else None))
        await eventually(lambda: len(rig.backend.works) == 4)
        rig.backend.works[0].dispatch()
        if way == "cancel":
            asking.cancel()
        (outcome,) = await asyncio.gather(asking, return_exceptions=True)
        assert isinstance(outcome, asyncio.CancelledError if way == "cancel" else DeadlineExceededError)
        await eventually(lambda: rig.server.intake.num_open == 0)
        assert all(work.is_cancelled for work in rig.backend.works)
        rig.backend.script = answer
        await client.embed([TEN] * 3)
        assert (await refusal(client.embed([TEN]))).reason == Reason.QUOTA_EXCEEDED


async def test_a_call_that_is_not_taken_on_costs_nothing(path: Path) -> None:
    _, token = new_key(path, "acme")
    set_terms(path, "acme", Terms(requests_per_minute=1, tokens_per_minute=10))
    async with running(keys_file=str(path)) as rig, client_of(rig, token) as client:
        rig.backend.refusal = OverloadedError("the queue is full")
        for _ in range(2):
            assert (await refusal(client.embed([TEN]))).reason == Reason.QUEUE_FULL
        rig.backend.refusal, rig.backend.script = None, answer
        await client.embed([TEN])


async def test_tenants_share_nothing(path: Path) -> None:
    tokens = [new_key(path, tenant)[1] for tenant in ("acme", "other")]
    async with running(keys_file=str(path)) as rig:
        rig.server.observe(RequestObserver(ObserverConfig()))
        rig.backend.script = answer
        for token in tokens:
            async with client_of(rig, token) as client:
                await client.embed([TEN], client_request_id="mine")
        first, second = (work.request for work in rig.backend.works)
        assert (first.tenant, second.tenant) == ("acme", "other")
        assert first.salt != second.salt
        async with client_of(rig, tokens[1]) as client:
            assert [record.tenant for record in await client.find_requests("mine")] == ["other"]


async def test_a_drain_lets_a_call_end_and_takes_no_other() -> None:
    async with running() as rig, client_of(rig) as client:
        asking = asyncio.create_task(client.embed([TEN] * 2))
        await eventually(lambda: len(rig.backend.works) == 2)
        draining = asyncio.create_task(rig.server.drain(5.0))
        await eventually(lambda: rig.server.intake.is_draining)
        error = await refusal(client.embed([TEN]))
        assert isinstance(error, UnavailableError)
        assert error.reason == Reason.DRAINING
        assert not draining.done()
        for work in rig.backend.works:
            answer(work)
        assert len(await asking) == 2
        await draining


class Observed:
    def __init__(self, rig: Rig, client: Client, meters: Meters) -> None:
        self.rig = rig
        self.client = client
        self.meters = meters

    async def record(self, name: str) -> Any:
        (record,) = await self.client.find_requests(name)
        return record


@pytest.fixture
async def observed() -> AsyncIterator[Observed]:
    meters = Meters()
    async with running() as rig, client_of(rig) as client:
        metrics = RouterMetrics(meters.meter, ["toy"], max_tenants=4)
        rig.server.observe(RequestObserver(ObserverConfig(), metrics))
        yield Observed(rig, client, meters)


async def test_a_call_is_told_of_as_an_answer_is(observed: Observed) -> None:
    observed.rig.backend.script = answer
    await observed.client.embed([TEN, TEN], client_request_id="both")
    meters = observed.meters
    assert meters.value("gen_ai.server.request.duration", name="embeddings") == 1
    assert meters.value("octavo.requests", name="embeddings", model="toy") == 1
    assert meters.value("octavo.requests", name="text_completion") == 0
    assert meters.value("octavo.tokens", model="toy", type="input") == 20
    assert meters.value("octavo.tenant.requests") == 1
    assert meters.value("octavo.request.prefill.duration") == 1
    assert meters.value("gen_ai.server.time_to_first_token") == 0
    record = await observed.record("both")
    assert (record.code, record.prompt_tokens, record.generated_tokens) == ("OK", 20, 0)
    assert (record.num_choices, len(record.attempts), record.is_running) == (0, 2, False)
    assert record.operation == "embeddings"
    assert min(part.duration_s for part in parts(record)) >= 0
    assert (observed.rig.server.intake.num_accepted, observed.rig.server.intake.num_ended) == (1, 1)


async def test_a_call_of_a_stranger_is_counted_as_refused(path: Path) -> None:
    new_key(path, "acme")
    meters = Meters()
    async with running(keys_file=str(path)) as rig, client_of(rig, "no token") as client:
        rig.server.observe(RequestObserver(ObserverConfig(), RouterMetrics(meters.meter, ["toy"], max_tenants=4)))
        assert (await refusal(client.embed([TEN]))).code is grpc.StatusCode.UNAUTHENTICATED
        assert not rig.backend.works
    assert meters.value("octavo.rejections") == 1


async def test_of_a_call_with_many_inputs_the_first_attempts_are_kept(observed: Observed) -> None:
    observed.rig.backend.script = answer
    await observed.client.embed([TEN] * (MAX_KEPT_ATTEMPTS + 4), client_request_id="many")
    record = await observed.record("many")
    assert (record.prompt_tokens, len(record.attempts)) == (10 * (MAX_KEPT_ATTEMPTS + 4), MAX_KEPT_ATTEMPTS)


async def test_a_call_that_runs_or_fails_is_told_of(observed: Observed) -> None:
    asking = asyncio.create_task(observed.client.embed([TEN], client_request_id="runs"))
    await eventually(lambda: len(observed.rig.backend.works) == 1)
    assert (await observed.record("runs")).is_running
    observed.rig.backend.works[0].end(OverloadedError("too much"))
    await refusal(asking)
    assert (await observed.record("runs")).reason == Reason.QUEUE_FULL
    await refusal(observed.client.embed([""], client_request_id="bad"))
    assert (await observed.record("bad")).code == "INVALID_ARGUMENT"
    assert observed.meters.value("octavo.requests", name="embeddings", type="QUEUE_FULL") == 1
    assert observed.meters.value("octavo.rejections") == 1
