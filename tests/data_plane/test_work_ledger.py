"""The books of a replica's data plane, over an engine that is stepped by hand."""

from __future__ import annotations

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb

from router.wire import from_tokens, to_work
from tests.data_plane.rig import KEYS, VOCAB, make_request
from workers.config import EngineConfig
from workers.fake import FakeEngine, fake_manifest
from workers.types import WorkId
from workers.work_ledger import AttachedRouter, WorkLedger


def make_ledger(*, in_columns: bool = False, chunk_tokens: int = 8) -> tuple[FakeEngine, WorkLedger, AttachedRouter]:
    engine = FakeEngine(
        EngineConfig(engine="fake", block_size=4, num_blocks=64, chunk_tokens=chunk_tokens),
        manifest=fake_manifest(vocab_size=VOCAB),
        hash_key=KEYS.prefix_hash,
    )
    ledger = WorkLedger(engine, "one")
    router = ledger.attach("router/1/1", lambda _: None, in_columns=in_columns)
    router.outbox.grant(100)
    return engine, ledger, router


def send(
    ledger: WorkLedger, router: AttachedRouter, number: int, *, batch_id: int = 0, num_tokens: int = 30, **fields: int
) -> None:
    """As a batch of its own, unless it is said of which."""
    request = make_request(range(number, number + num_tokens), **fields)  # type: ignore[arg-type]
    work = to_work(request, work_id=number, attempt=1, now=request.accepted_at, traceparent="", tracestate="")
    ledger.submit(router, pb.Dispatch(batch_id=batch_id or number, work=[work]), request.accepted_at)


def report(ledger: WorkLedger, router: AttachedRouter) -> pb.StepBatch:
    ledger.collect()
    return router.outbox.take().step_batch


def test_the_first_report_that_counts_a_dispatch_says_so() -> None:
    """It took two steps or a first token, and for so long the router counted each prompt twice."""
    engine, ledger, router = make_ledger()
    assert report(ledger, router).last_batch_id == 0
    send(ledger, router, 1)
    batch = report(ledger, router)
    assert (batch.last_batch_id, batch.load.owed_prefill_tokens) == (1, 30)
    engine.step()
    send(ledger, router, 2)
    batch = report(ledger, router)
    assert (batch.last_batch_id, batch.load.owed_prefill_tokens) == (2, 22 + 30)


def test_a_batch_in_two_messages_is_counted_when_both_are(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, ledger, router = make_ledger()
    send(ledger, router, 1, batch_id=7)
    half = engine.load()
    send(ledger, router, 2, batch_id=7)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "load", lambda: half)
        assert report(ledger, router).last_batch_id == 0
    assert report(ledger, router).last_batch_id == 7


@pytest.mark.parametrize(("chunk_tokens", "is_urgent"), [(32, True), (8, False)])
def test_other_routers_hear_at_once_of_a_prompt_in_the_cache(chunk_tokens: int, is_urgent: bool) -> None:
    engine, ledger, router = make_ledger(chunk_tokens=chunk_tokens)
    heard: list[bool] = []
    ledger.attach("other/1/2", heard.append)
    send(ledger, router, 1, num_tokens=40)
    ledger.collect()  # the load with the work
    heard.clear()
    engine.step()
    ledger.collect()
    assert heard == [is_urgent]


def test_a_report_says_what_the_engine_has_by_its_own_books() -> None:
    engine, ledger, router = make_ledger()
    send(ledger, router, 1)
    for _ in range(3):
        engine.step()
    batch = report(ledger, router)
    assert batch.resident.num_blocks == len(batch.kv_events.stored) // 16 == 6
    ledger.resident.clear()
    engine.kv_events(anew=True)
    assert report(ledger, router).resident == batch.resident, "whatever became of the events"
    ledger.collect(anew=True)
    again = router.outbox.take().step_batch
    assert again.kv_events.cleared
    assert (again.kv_events.stored, again.resident) == (batch.kv_events.stored, batch.resident)
    assert b"".join(ledger.resident) == batch.kv_events.stored


def test_plain_tokens_go_in_columns_and_all_else_as_deltas() -> None:
    """The first token says what was cached, the last one why it ends; of a second choice columns know nothing."""
    engine, ledger, router = make_ledger(in_columns=True)
    send(ledger, router, 1, max_tokens=3)
    send(ledger, router, 2, max_tokens=3, n=2)
    told = []
    while ledger.num_works:
        engine.step()
        batch = report(ledger, router)
        plain = [(number, 0, "plain") for number, _ in from_tokens(batch.tokens)]
        told += plain + [(d.work_id, d.index, d.finish.reason) for d in batch.deltas]
    assert [each for each in told if each[0] == 1] == [(1, 0, ""), (1, 0, "plain"), (1, 0, "length")]
    assert [each for each in told if each[:2] == (2, 0)] == [(2, 0, ""), (2, 0, "plain"), (2, 0, "length")]
    assert [each for each in told if each[:2] == (2, 1)] == [(2, 1, ""), (2, 1, ""), (2, 1, "length")]


@pytest.mark.parametrize("choices", [[], [pb.Abort.Choice(work_id=1, index=0)]])
@pytest.mark.parametrize("num_steps", [0, 6])
def test_nothing_is_told_of_what_was_aborted(choices: list[pb.Abort.Choice], num_steps: int) -> None:
    """Neither before nor after its first token; the engine ends it a step late, as one on a thread of its own does."""
    engine, ledger, router = make_ledger(in_columns=True)
    send(ledger, router, 1, max_tokens=50)
    for _ in range(num_steps):
        engine.step()
    report(ledger, router)
    end, engine.abort = engine.abort, lambda *_: None  # type: ignore[method-assign]
    ledger.abort(router, pb.Abort(choices=choices) if choices else pb.Abort(work_ids=[1]))
    for _ in range(8):
        engine.step()
    end(WorkId(router.owner, 1))
    batch = report(ledger, router)
    assert not batch.deltas
    assert not batch.HasField("tokens")
    assert ledger.num_works == 0


def test_routers_that_have_works_share_what_is_free() -> None:
    engine, ledger, first = make_ledger()
    second = ledger.attach("router/2/1", lambda _: None)
    second.outbox.grant(100)
    credit = engine.load().credit_sequences
    assert credit == 65
    for router in (first, second):
        assert report(ledger, router).load.credit_sequences == credit, "nobody has anything yet"
    send(ledger, first, 1, max_tokens=50)
    for _ in range(5):
        engine.step()  # the prompt
    load = report(ledger, first).load
    assert (load.credit_sequences, load.credit_tokens) == (64, engine.load().credit_tokens)
    assert report(ledger, second).load.credit_sequences == 32, "it would be the second one"
    send(ledger, second, 2, max_tokens=50)
    for _ in range(5):
        engine.step()
    assert report(ledger, first).load.credit_sequences == 32
    ledger.abort(second, pb.Abort(work_ids=[2]))
    while ledger.num_works > 1:
        engine.step()
        ledger.collect()
    assert report(ledger, first).load.credit_sequences == 64
    assert (first.num_works, second.num_works) == (1, 0)


def test_routers_hear_of_the_works_of_others_at_once() -> None:
    """After 50 ms, as of all else without tokens: until then each of four routers took the same replica for idle."""
    engine, ledger, sender = make_ledger()
    heard: list[bool] = []
    other = ledger.attach("other/1/1", heard.append)
    other.outbox.grant(100)
    ledger.collect()
    send(ledger, sender, 1)
    ledger.collect()
    engine.step()
    ledger.collect()
    engine.step()
    ledger.collect()
    assert heard == [False, True, False, False]
    assert other.outbox.take().step_batch.load.num_running == 1
    send(ledger, other, 1)
    ledger.collect()
    assert not heard[-1], "of its own it knows"
