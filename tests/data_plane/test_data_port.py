"""The data port, spoken to by hand: who is let in, what strangers learn, credits, merging, heartbeats."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import chain
from typing import Any

import grpc.aio
import pytest
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.internal.v1.data_plane_pb2_grpc import DataPlaneServiceStub
from octavo.names import Reason

from router.wire import from_tokens
from tests.client.cuttable_proxy import cuttable_proxy
from tests.data_plane.rig import KEYS, PATIENCE_S, VOCAB, Replica, until
from workers.data_plane import DataPlaneServer, DataPlaneTimes
from workers.errors import StartupError
from workers.fake import fake_continuation
from workers.handshake import MIN_PROTOCOL, PROTOCOL, TOKENS_PROTOCOL, prove


@asynccontextmanager
async def replica_and_stream(**engine: Any) -> AsyncIterator[tuple[Replica, Any]]:
    """A started replica and a stream to it, on which the replica has the next word."""
    replica = await Replica("one", **engine).start()
    try:
        async with grpc.aio.insecure_channel(replica.server.address) as channel:
            yield replica, DataPlaneServiceStub(channel).Attach()
    finally:
        await replica.stop()


def answer(challenge: pb.Challenge, **changes: Any) -> pb.AttachRequest:
    """The Hello of a good router, but for `changes`."""
    proof = prove(
        KEYS.data_plane, nonce=challenge.nonce, replica_id=challenge.replica_id, router_id="by hand", router_epoch=3
    )
    fields = {"protocol": PROTOCOL, "router_id": "by hand", "router_epoch": 3, "proof": proof}
    return pb.AttachRequest(hello=pb.Hello(**(fields | changes)))


async def attach(call: Any, credit: int = 1_000, protocol: int = PROTOCOL) -> pb.HelloAck:
    first = answer((await call.read()).challenge, protocol=protocol)
    first.credit.step_batches = credit
    await call.write(first)
    return (await call.read()).hello_ack


async def assert_refused(call: Any, code: grpc.StatusCode, text: str) -> None:
    """The replica ends the stream with this status, and tells no more of itself."""
    while (message := await _read_or_end(call)) is not None:
        assert not message.HasField("hello_ack")
    assert await call.code() is code
    assert text in await call.details()


async def _read_or_end(call: Any) -> pb.AttachResponse | None:
    try:
        message = await call.read()
    except grpc.aio.AioRpcError:
        return None
    return None if message is grpc.aio.EOF else message


def work(number: int, prompt: list[int], max_tokens: int = 4, **fields: Any) -> pb.Work:
    sampling = pb.SamplingParams(top_p=1.0, repetition_penalty=1.0)
    generate = pb.Generate(prompt_token_ids=prompt, max_tokens=max_tokens, sampling=sampling)
    return pb.Work(**({"work_id": number, "attempt": 1, "generate": generate} | fields))


async def read_until(call: Any, condition: Any) -> list[pb.StepBatch]:
    batches: list[pb.StepBatch] = []
    async with asyncio.timeout(PATIENCE_S):
        while not (batches and condition(batches)):
            batches.append((await call.read()).step_batch)
    return batches


def has_finished(number: int) -> Any:
    return lambda batches: any(d.work_id == number and d.HasField("finish") for d in batches[-1].deltas)


def tokens_of(batches: list[pb.StepBatch], number: int) -> list[int]:
    """Of the work's only choice, in whatever form they came."""
    tokens: list[int] = []
    for batch in batches:
        parts = [list(d.token_ids) for d in batch.deltas if d.work_id == number]
        parts += [token_ids for other, token_ids in from_tokens(batch.tokens) if other == number]
        assert len(parts) <= 1
        tokens += chain.from_iterable(parts)
    return tokens


async def test_a_good_router_learns_all_about_the_replica() -> None:
    async with replica_and_stream() as (replica, call):
        ack = await attach(call)
        info = replica.engine.info
        assert (ack.replica_id, ack.protocol, ack.epoch) == ("one", PROTOCOL, replica.server.epoch)
        assert (ack.block_size, ack.num_blocks, ack.max_model_len) == (4, 256, 1_000)
        assert list(ack.capabilities) == ["generate", "received_choices", "received_penalties"]
        assert ack.fingerprints.hash_key == info.hash_key_fingerprint
        assert ack.load.num_free_blocks == 256
        assert ack.load.credit_tokens > 0
        assert ack.resident == pb.KvEvents(cleared=True)


async def test_a_stranger_who_says_nothing_is_shown_out() -> None:
    async with replica_and_stream(times=DataPlaneTimes(hello_s=0.05)) as (replica, call):
        challenge = (await call.read()).challenge
        assert len(challenge.nonce) == 32
        await assert_refused(call, grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_PROOF)
        assert replica.server.num_routers == 0


@pytest.mark.parametrize(
    "first",
    [
        pb.AttachRequest(),
        pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [1, 2, 3])])),
        pb.AttachRequest(hello=pb.Hello(protocol=PROTOCOL, router_id="by hand", router_epoch=3)),
        pb.AttachRequest(hello=pb.Hello(protocol=PROTOCOL, router_id="by hand", router_epoch=3, proof=bytes(32))),
    ],
)
async def test_a_stranger_who_proves_nothing_is_refused_and_nothing_runs(first: pb.AttachRequest) -> None:
    async with replica_and_stream() as (replica, call):
        await call.read()
        await call.write(first)
        await assert_refused(call, grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_PROOF)
        assert replica.server.num_works == replica.server.num_routers == 0


@pytest.mark.parametrize("is_router", [False, True])
async def test_bytes_that_are_no_message(is_router: bool) -> None:
    """gRPC told a stranger UNKNOWN and the text of the exception."""
    async with replica_and_stream() as (replica, unused):
        unused.cancel()
        async with grpc.aio.insecure_channel(replica.server.address) as channel:
            attach = channel.stream_stream(  # type: ignore[var-annotated]
                "/octavo.internal.v1.DataPlaneService/Attach",
                request_serializer=bytes,
                response_deserializer=pb.AttachResponse.FromString,
            )
            call: Any = attach()
            challenge = (await call.read()).challenge
            if is_router:
                await call.write(answer(challenge).SerializeToString())
                assert (await call.read()).hello_ack.replica_id == "one"
            await call.write(b"\x0a\x02\xff\xff")
            code = grpc.StatusCode.INVALID_ARGUMENT if is_router else grpc.StatusCode.UNAUTHENTICATED
            await assert_refused(call, code, Reason.INCOMPATIBLE_PEER if is_router else Reason.BAD_PROOF)
        await until(lambda: replica.server.num_routers == 0)


@pytest.mark.parametrize("changed", ["router_id", "router_epoch"])
async def test_a_proof_is_for_one_router_and_epoch(changed: str) -> None:
    async with replica_and_stream() as (_, call):
        value: Any = {"router_id": "another", "router_epoch": 4}[changed]
        await call.write(answer((await call.read()).challenge, **{changed: value}))
        await assert_refused(call, grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_PROOF)


async def test_a_replayed_hello_is_refused() -> None:
    async with replica_and_stream() as (replica, call):
        overheard = answer((await call.read()).challenge)
        await call.write(overheard)
        assert (await call.read()).hello_ack.replica_id == "one"
        async with grpc.aio.insecure_channel(replica.server.address) as channel:
            again = DataPlaneServiceStub(channel).Attach()
            await again.read()
            await again.write(overheard)
            await assert_refused(again, grpc.StatusCode.UNAUTHENTICATED, Reason.BAD_PROOF)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"protocol": 0}, "protocol must be in [1, 2], is 0"),
        ({"protocol": 99}, "protocol must be in [1, 2], is 99"),
        ({"fingerprints": pb.Fingerprints(model="other")}, "expects model 'other', this replica has 'fake'"),
        ({"fingerprints": pb.Fingerprints(tokenizer="other")}, "expects tokenizer 'other'"),
        ({"fingerprints": pb.Fingerprints(hash_key="other")}, "expects hash key 'other'"),
    ],
)
async def test_a_router_that_does_not_fit_is_told_why(changes: dict[str, Any], text: str) -> None:
    async with replica_and_stream() as (replica, call):
        await call.write(answer((await call.read()).challenge, **changes))
        await assert_refused(call, grpc.StatusCode.FAILED_PRECONDITION, f"{Reason.INCOMPATIBLE_PEER}: ")
        assert text in await call.details()
        assert replica.server.num_routers == 0


async def test_a_second_hello_ends_the_stream() -> None:
    async with replica_and_stream() as (replica, call):
        first = answer((await call.read()).challenge)
        await call.write(first)
        await call.read()
        await call.write(first)
        await assert_refused(call, grpc.StatusCode.INVALID_ARGUMENT, "only the first message")
        await until(lambda: replica.server.num_routers == 0)


async def test_a_work_id_in_use_ends_the_stream_and_its_works() -> None:
    async with replica_and_stream(fake_step_s=0.005) as (replica, call):
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [1], 900)] * 2)))
        await assert_refused(call, grpc.StatusCode.INVALID_ARGUMENT, "work 1 is running already")
        await until(lambda: replica.server.num_works == 0)
        await until(lambda: replica.thread.load().num_free_blocks == 256)


@pytest.mark.parametrize("protocol", [MIN_PROTOCOL, PROTOCOL])
async def test_the_tokens_of_a_step_come_in_one_message_with_load_and_events(protocol: int) -> None:
    async with replica_and_stream() as (replica, call):
        assert (await attach(call, protocol=protocol)).protocol == protocol
        prompts = {number: [number] * 8 for number in (1, 2, 3)}
        dispatch = pb.Dispatch(batch_id=9, work=[work(n, prompt, 6) for n, prompt in prompts.items()])
        batches: list[pb.StepBatch] = []
        with one_by_one(replica) as may_step:
            await call.write(pb.AttachRequest(dispatch=dispatch))
            await until(lambda: replica.server.num_works == 3)
            while not (batches and has_finished(3)(batches)):
                may_step.release()
                batches += await read_until(call, lambda new: new[-1].deltas or new[-1].HasField("tokens"))
        for number, prompt in prompts.items():
            assert tokens_of(batches, number) == fake_continuation(prompt, 6, VOCAB)
        with_tokens = [batch for batch in batches if batch.deltas or batch.HasField("tokens")]
        num_deltas = [3, 3, 3, 3, 3, 3] if protocol < TOKENS_PROTOCOL else [3, 0, 0, 0, 0, 3]
        assert [len(batch.deltas) for batch in with_tokens] == num_deltas
        assert [len(batch.tokens.work_ids) for batch in with_tokens] == [3 - count for count in num_deltas]
        assert [d.cached_tokens for d in with_tokens[0].deltas if d.HasField("cached_tokens")] == [0, 0, 0]
        assert not any(d.HasField("cached_tokens") for d in with_tokens[1].deltas)
        assert all(batch.HasField("load") for batch in batches)
        assert len(with_tokens[0].kv_events.stored) == 3 * 2 * 16
        assert with_tokens[-1].last_batch_id == 9
        assert with_tokens[-1].load.num_running == 0
        steps = [batch.step for batch in with_tokens]
        assert steps == sorted(set(steps))


@contextmanager
def one_by_one(replica: Replica) -> Iterator[threading.Semaphore]:
    """Have the engine take a step when it may, and its thread look for new works when it may for the first time."""
    step, may_step = replica.engine.step, threading.Semaphore(0)

    def step_later() -> bool:
        may_step.acquire()
        return step()

    def begin() -> None:
        may_step.acquire()
        may_step.release()

    replica.thread._inbox.put(begin)
    replica.engine.step = step_later  # type: ignore[method-assign]
    try:
        yield may_step
    finally:
        replica.engine.step = step  # type: ignore[method-assign]
        may_step.release(1_000)


async def test_without_credit_steps_are_merged() -> None:
    """A slow router: all steps wait in one message."""
    async with replica_and_stream() as (replica, call):
        await attach(call, credit=0)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 100)])))
        await until(lambda: replica.thread.load().num_computed_tokens == 107 and replica.server.num_works == 0)
        await call.write(pb.AttachRequest(credit=pb.Credit(step_batches=1)))
        (batch,) = await read_until(call, has_finished(1))
        (delta,) = batch.deltas
        assert list(delta.token_ids) == fake_continuation([5] * 8, 100, VOCAB)
        assert delta.cached_tokens == 0
        assert len(batch.kv_events.stored) == (8 + 100 - 1) // 4 * 16


async def test_an_abort_is_final_and_frees_blocks() -> None:
    async with replica_and_stream(fake_step_s=0.002) as (replica, call):
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 900)])))
        await read_until(call, lambda batches: tokens_of(batches, 1))
        await call.write(pb.AttachRequest(abort=pb.Abort(work_ids=[1, 1, 77])))
        await until(lambda: replica.thread.load().num_free_blocks == 256)
        batches = await read_until(call, lambda batches: batches[-1].load.num_running == 0)
        assert not any(d.HasField("finish") for batch in batches for d in batch.deltas)
        assert replica.server.num_works == 0


async def test_an_abort_of_one_choice_leaves_the_others() -> None:
    async with replica_and_stream(fake_step_s=0.002) as (replica, call):
        await attach(call)
        several = work(1, [5] * 8, 400)
        several.generate.n = 2
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[several])))
        await read_until(call, lambda batches: tokens_of(batches, 1))
        choices = [pb.Abort.Choice(work_id=number, index=index) for number, index in ((1, 0), (1, 0), (1, 9), (77, 0))]
        await call.write(pb.AttachRequest(abort=pb.Abort(choices=choices)))
        batches = await read_until(call, has_finished(1))
        finishes = [(d.index, d.finish.reason) for b in batches for d in b.deltas if d.HasField("finish")]
        assert finishes == [(1, "length")]
        await until(lambda: replica.server.num_works == 0)
        await until(lambda: replica.thread.load().num_free_blocks == 256)


async def test_a_timeout_becomes_a_deadline_of_this_process() -> None:
    async with replica_and_stream(fake_step_s=0.002) as (_, call):
        await attach(call)
        dispatch = pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 900, timeout_us=60_000)])
        started = time.monotonic()
        await call.write(pb.AttachRequest(dispatch=dispatch))
        batches = await read_until(call, has_finished(1))
        assert time.monotonic() - started >= 0.06
        assert batches[-1].deltas[-1].finish.reason == "deadline"


async def test_work_of_another_kind_is_refused_by_name() -> None:
    async with replica_and_stream() as (replica, call):
        await attach(call)
        works = [pb.Work(work_id=1, pool=pb.Pool(token_ids=[1], method="mean")), pb.Work(work_id=2)]
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=works)))
        batches = await read_until(
            call, lambda batches: {d.work_id for b in batches for d in b.deltas if d.HasField("finish")} == {1, 2}
        )
        finishes = [d.finish for batch in batches for d in batch.deltas]
        assert {finish.error_reason for finish in finishes} == {Reason.ENGINE_CAPABILITY}
        assert replica.server.num_works == 0


async def test_a_disconnected_router_loses_its_works() -> None:
    async with replica_and_stream(fake_step_s=0.002) as (replica, call):
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 900)])))
        await read_until(call, lambda batches: tokens_of(batches, 1))
        call.cancel()
        await until(lambda: replica.server.num_routers == replica.server.num_works == 0)
        await until(lambda: replica.thread.load().num_free_blocks == 256)


async def test_a_router_whose_machine_is_gone_loses_its_works() -> None:
    """Nothing closes such a connection: its works went on to their end, and the stream for hours."""
    replica = await Replica("one", times=DataPlaneTimes(silence_s=1.5), fake_step_s=0.05).start()
    async with (
        cuttable_proxy(replica.server.address) as proxy,
        grpc.aio.insecure_channel(proxy.address) as channel,
    ):
        call: Any = DataPlaneServiceStub(channel).Attach()
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 900)])))
        await read_until(call, lambda batches: tokens_of(batches, 1))
        proxy.freeze()
        await until(lambda: replica.server.num_routers == replica.server.num_works == 0)
        call.cancel()
    await replica.stop()


async def test_each_attachment_hears_of_its_own_works_only() -> None:
    """The same router attaches twice and uses the same work ids: as after a broken stream."""
    async with replica_and_stream(fake_step_s=0.002) as (replica, call):
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 20)])))
        async with grpc.aio.insecure_channel(replica.server.address) as channel:
            second = DataPlaneServiceStub(channel).Attach()
            await attach(second)
            await second.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [6] * 8, 20)])))
            assert tokens_of(await read_until(second, has_finished(1)), 1) == fake_continuation([6] * 8, 20, VOCAB)
            assert tokens_of(await read_until(call, has_finished(1)), 1) == fake_continuation([5] * 8, 20, VOCAB)
            second.cancel()


async def test_a_router_that_attaches_later_knows_what_is_resident() -> None:
    async with replica_and_stream() as (replica, call):
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 1)])))
        batches = await read_until(call, has_finished(1))
        stored = batches[-1].kv_events.stored
        async with grpc.aio.insecure_channel(replica.server.address) as channel:
            second = DataPlaneServiceStub(channel).Attach()
            ack = await attach(second)
            assert ack.resident == pb.KvEvents(cleared=True, stored=stored)
            second.cancel()


async def test_an_idle_replica_has_a_heartbeat() -> None:
    async with replica_and_stream() as (_, call):
        await attach(call)
        batches = await read_until(call, lambda batches: len(batches) == 3)
        assert all(batch.HasField("load") and not batch.deltas for batch in batches)


async def test_drain_is_announced_and_new_work_is_turned_down() -> None:
    async with replica_and_stream() as (replica, call):
        await attach(call)
        assert await replica.server.drain(2.0)
        while not (message := await call.read()).HasField("draining"):
            pass
        assert message.draining.grace_us == 2_000_000
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8)])))
        batches = await read_until(call, has_finished(1))
        assert batches[-1].deltas[0].finish.error_reason == Reason.DRAINING
        async with grpc.aio.insecure_channel(replica.server.address) as channel:
            await assert_refused(DataPlaneServiceStub(channel).Attach(), grpc.StatusCode.UNAVAILABLE, Reason.DRAINING)


async def test_an_engine_that_closes_loses_works_and_does_not_say_cancelled() -> None:
    async with replica_and_stream(fake_step_s=0.002) as (replica, call):
        await attach(call)
        await call.write(pb.AttachRequest(dispatch=pb.Dispatch(batch_id=1, work=[work(1, [5] * 8, 900)])))
        await read_until(call, lambda batches: tokens_of(batches, 1))
        replica.thread.close()
        finish = (await read_until(call, has_finished(1)))[-1].deltas[0].finish
        assert (finish.reason, finish.error_reason) == ("error", Reason.REPLICA_LOST)


async def test_a_port_in_use_is_said_so() -> None:
    replica = await Replica("one").start()
    port = int(replica.server.address.rpartition(":")[2])
    server = DataPlaneServer(replica_id="two", key=KEYS.data_plane, port=port)
    with pytest.raises(StartupError, match=f"127.0.0.1:{port} cannot be bound"):
        await server.start(replica.thread)
    await server.stop()
    await replica.stop()
    await replica.server.stop()
    replica.server.notify()
