"""Messages that neither a router nor a replica of ours would send: refused, or without effect on anybody else.

The many are sent by `python -m load_tests.rigs.trust_fuzz`, of whose mutator these are a few; below them what was found
so, and by reading, on its own.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any

import grpc.aio
import pytest
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.internal.v1 import data_plane_pb2 as pb
from octavo.names import Reason

from load_tests.rigs.fuzz_data import HostileReplica, HostileRouter
from load_tests.rigs.fuzz_direct import Replica as ReplicaBooks
from load_tests.rigs.fuzz_direct import Router as RouterBooks
from load_tests.rigs.fuzz_public import open_channel
from load_tests.rigs.fuzz_samples import NUMBERS, TEXTS, of_kind
from load_tests.rigs.fuzz_tally import FuzzTally
from load_tests.rigs.message_mutator import Mutator
from router.choice import Choice
from router.flight import Flight
from router.hello import MismatchError, shake_hands
from router.journal import Journal
from router.types import ReplicaAddress
from router.wire import from_tokens
from tests.data_plane.rig import (
    KEYS,
    ROUTER,
    VOCAB,
    RecordingSink,
    Replica,
    assert_answers,
    assert_idle,
    make_prompt,
    make_request,
    ready_cluster,
    until,
)
from tests.router.rig import served_model
from workers.config import EngineConfig
from workers.errors import UnavailableError
from workers.fake import FakeEngine, fake_manifest
from workers.prefix import PrefixHasher
from workers.types import FinishReason, GenerateWork, WorkId
from workers.wire import MAX_CHOICES, from_work
from workers.work_ledger import BadDispatchError, WorkLedger

SAMPLES = of_kind()


@pytest.mark.parametrize(("side", "kind"), [(ReplicaBooks, pb.AttachRequest), (RouterBooks, pb.AttachResponse)])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_each_side_takes_or_refuses_what_the_other_may_say(
    side: type[ReplicaBooks | RouterBooks], kind: type[Message], seed: int
) -> None:
    mutator, tally = Mutator(seed, texts=TEXTS, numbers=NUMBERS), FuzzTally()
    books = side(tally)
    for _ in range(6):
        books.take(mutator.mutated(kind, SAMPLES[kind]))
    books.check()
    assert tally.failures == []


async def test_a_replica_among_strangers_and_hostile_routers_serves_its_own() -> None:
    tally, mutator = FuzzTally(), Mutator(3, texts=TEXTS, numbers=NUMBERS)
    replica = Replica("good")
    async with ready_cluster(replica) as dispatcher, open_channel(replica.server.address) as channel:
        hostile = HostileRouter(channel, KEYS, mutator, tally)
        await hostile.knock(25)
        await hostile.attack(250)
        assert tally.failures == []
        assert tally.codes["stranger: UNAUTHENTICATED"] == 25
        await until(lambda: replica.server.num_routers == 1 and replica.server.num_works == 0)
        request = make_request(make_prompt(random.Random(1), 20))
        dispatcher.submit(request, sink := RecordingSink())
        assert_answers(await sink.wait(), request)
        await assert_idle(dispatcher, replica)


class AnySink(RecordingSink):
    """Of an answer that a hostile replica gives: it need not be right, but it ends once."""

    def cached(self, num_tokens: int) -> None:
        self.cached_tokens = num_tokens

    def pooled(self, index: int, values: list[float]) -> None:
        pass


async def test_a_router_with_hostile_replicas_ends_every_request_once(caplog: pytest.LogCaptureFixture) -> None:
    tally, rng = FuzzTally(), random.Random(2)
    good = Replica("good")
    async with ready_cluster(good) as dispatcher:
        hostile = [HostileReplica(f"bad-{i}", KEYS, Mutator(i, texts=TEXTS), tally) for i in range(2)]
        for replica in hostile:
            await replica.start()
        others = [ReplicaAddress(replica_id=each.replica_id, address=each.address) for each in hostile]
        dispatcher.update_replicas([good.address, *others])
        sinks = []
        while tally.num_messages < 400:
            for _ in range(5):
                dispatcher.submit(make_request(make_prompt(rng, 12), timeout_s=5.0), sink := AnySink())
                sinks.append(sink)
            await asyncio.sleep(0.02)
        dispatcher.update_replicas([good.address])
        for replica in hostile:
            await replica.stop()
        for sink in sinks:
            await sink.wait()
        request = make_request(make_prompt(rng, 20))
        dispatcher.submit(request, sink := RecordingSink())
        assert_answers(await sink.wait(), request)
    assert tally.codes["hostile replica: attached"] > 2
    assert [
        record.name for record in caplog.records if record.levelname == "ERROR" and record.name != "grpc._common"
    ] == []


# What a router that knows the secret could do to a replica.


def work(number: int = 1, **generate: Any) -> pb.Work:
    fields = {"prompt_token_ids": [1, 2, 3], "max_tokens": 4} | generate
    return pb.Work(work_id=number, attempt=1, generate=pb.Generate(**fields))


def new_engine() -> FakeEngine:
    manifest = fake_manifest(vocab_size=VOCAB, max_model_len=1_000)
    return FakeEngine(EngineConfig(engine="fake", num_blocks=64), manifest=manifest, hash_key=KEYS.prefix_hash)


def test_choices_without_end() -> None:
    """A work of four thousand million choices took all memory: each is a sequence before anything else is known."""
    with pytest.raises(ValueError, match=f"at most {MAX_CHOICES} choices, has 4294967295"):
        from_work(work(n=2**32 - 1), "router", 0.0)
    ledger = WorkLedger(new_engine(), "one")
    router = ledger.attach("router", lambda is_urgent: None)
    ledger.submit(router, pb.Dispatch(batch_id=1, work=[work(n=2**32 - 1)]), 0.0)
    router.outbox.grant(1)
    (delta,) = router.outbox.take().step_batch.deltas
    assert (delta.finish.reason, delta.finish.error_reason) == ("error", Reason.ENGINE_CAPABILITY)
    assert ledger.num_works == 0


def test_more_works_than_any_credit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica took on whatever came, until it had no memory left."""
    monkeypatch.setattr("workers.work_ledger.MAX_HELD_CHOICES", 3)
    ledger = WorkLedger(new_engine(), "one")
    router = ledger.attach("router", lambda is_urgent: None)
    works = [work(1), work(2, n=2), work(4), work(5, n=2)]
    ledger.submit(router, pb.Dispatch(batch_id=1, work=works), 0.0)
    router.outbox.grant(1)
    deltas = router.outbox.take().step_batch.deltas
    assert len(deltas) == 3
    assert {delta.work_id: delta.finish.error_reason for delta in deltas} == dict.fromkeys((4, 5), Reason.QUEUE_FULL)
    ledger.detach(router)


def test_more_refusals_than_anybody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each of 1,024 choices that a work of a few bytes may ask for, and for each work: gigabytes of them."""
    monkeypatch.setattr("workers.work_ledger.MAX_HELD_CHOICES", 3)
    monkeypatch.setattr("workers.work_ledger.MAX_UNTOLD_CHOICES", 6)
    ledger = WorkLedger(new_engine(), "one")
    router = ledger.attach("router", lambda is_urgent: None)
    ledger.submit(router, pb.Dispatch(batch_id=1, work=[work(1, n=4), work(2, n=4)]), 0.0)
    with pytest.raises(BadDispatchError, match="more than 6 choices wait"):
        ledger.submit(router, pb.Dispatch(batch_id=2, work=[work(3, n=4)]), 0.0)
    router.outbox.grant(1)
    assert len(router.outbox.take().step_batch.deltas) == 8
    ledger.submit(router, pb.Dispatch(batch_id=2, work=[work(3, n=4)]), 0.0)
    ledger.detach(router)


def test_aborts_of_choices_that_a_work_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them was kept with its work and handed to the engine, as many as there are numbers."""
    engine = new_engine()
    ledger = WorkLedger(engine, "one")
    router = ledger.attach("router", lambda is_urgent: None)
    ledger.submit(router, pb.Dispatch(batch_id=1, work=[work(1, n=2)]), 0.0)
    aborted: list[int | None] = []
    monkeypatch.setattr(engine, "abort", lambda work_id, index=None: aborted.append(index))
    choices = [pb.Abort.Choice(work_id=1, index=index) for index in (2, 0, 2**32 - 1, 1, 1)]
    ledger.abort(router, pb.Abort(choices=choices))
    assert aborted == [0, 1]


def test_a_prompt_that_is_too_long_is_not_copied_for_each_choice() -> None:
    engine = new_engine()
    refused = GenerateWork(work_id=WorkId("router", 1), prompt=[1] * 2_000, max_tokens=1, n=3)
    engine.submit(refused)
    finishes = [delta.finish for delta in engine.drain_outputs()]
    assert [each and (each.reason, each.error_reason) for each in finishes] == [
        (FinishReason.ERROR, Reason.PROMPT_TOO_LONG)
    ] * 3
    assert engine.load().num_waiting == engine.load().num_running == 0


# What a replica that knows the secret could do to a router.


class ScriptedCall:
    """A call whose other end says these."""

    def __init__(self, *responses: object) -> None:
        self.responses = list(responses)
        self.written: list[Message] = []

    async def read(self) -> object:
        return self.responses.pop(0) if self.responses else grpc.aio.EOF

    async def write(self, message: Message) -> None:
        self.written.append(message)


def challenge(**changes: Any) -> pb.AttachResponse:
    fields = {"nonce": bytes(32), "replica_id": "one", "min_protocol": 1, "max_protocol": 2}
    return pb.AttachResponse(challenge=pb.Challenge(**(fields | changes)))


@pytest.mark.parametrize("nonce", [b"", bytes(31), bytes(32) + b"an"])
async def test_nothing_but_a_nonce_is_signed(nonce: bytes) -> None:
    """Whoever answered at the address of replica "one" could have the router sign a nonce of replica "anone", with "an"
    behind it."""
    call = ScriptedCall(challenge(nonce=nonce))
    with pytest.raises(MismatchError, match=f"a nonce must have 32 bytes, has {len(nonce)}"):
        await shake_hands(call, ROUTER, "one", credit=1)
    assert call.written == []


async def test_bytes_that_are_no_message_of_the_handshake() -> None:
    """gRPC says None for them, on which an assertion failed."""
    for said in ([], [challenge()]):
        with pytest.raises(MismatchError, match="no message of the data plane"):
            await shake_hands(ScriptedCall(*said, None), ROUTER, "one", credit=1)


async def test_a_replica_says_little_of_itself() -> None:
    """All of it is kept, and told to whoever asks for the status, in one message."""
    hash_key = PrefixHasher(KEYS.prefix_hash, 4).key_fingerprint
    ack = pb.HelloAck(block_size=4, fingerprints=pb.Fingerprints(hash_key=hash_key))
    ack.resident.stored = bytes(16 * 10_000)
    assert await shake_hands(ScriptedCall(challenge(), pb.AttachResponse(hello_ack=ack)), ROUTER, "one", credit=1)
    ack.kernels = "x" * 70_000
    with pytest.raises(MismatchError, match="must tell of itself in 65536 bytes at most, needs 70"):
        await shake_hands(ScriptedCall(challenge(), pb.AttachResponse(hello_ack=ack)), ROUTER, "one", credit=1)


def test_a_work_that_never_stops() -> None:
    """Its tokens were kept until the deadline, however many they were."""
    flight = Flight(1, make_request([1], 4, n=2), RecordingSink(), None)  # type: ignore[arg-type]
    flight.count(8, 0.0)
    with pytest.raises(ValueError, match="a work of at most 8 tokens has 9"):
        flight.count(1, 0.0)


def test_a_work_that_is_named_without_tokens() -> None:
    with pytest.raises(ValueError, match="has none of work 5"):
        list(from_tokens(pb.WorkTokens(work_ids=[5], num_tokens=[0])))


def test_tokens_without_the_log_probabilities_that_were_asked_for() -> None:
    """The answer ended with INTERNAL, as if the router itself had failed."""
    choice = Choice(served_model().tokenizer.detokenizer())
    journal = Journal([choice], num_choices=1, num_logprobs=0, sends_logprobs=True)
    with pytest.raises(UnavailableError, match="2 tokens with 0 log probabilities"):
        journal.push(0, [1, 2], [])
    assert not journal.has_deltas(None)  # it had the tokens, and failed once more when they were to be sent
