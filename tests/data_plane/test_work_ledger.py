"""The books of a replica's data plane, over an engine that is stepped by hand."""

from __future__ import annotations

from octavo.internal.v1 import data_plane_pb2 as pb

from router.wire import to_work
from tests.data_plane.rig import KEYS, VOCAB, make_request
from workers.config import EngineConfig
from workers.fake import FakeEngine, fake_manifest
from workers.work_ledger import AttachedRouter, WorkLedger


def make_ledger() -> tuple[FakeEngine, WorkLedger, AttachedRouter]:
    engine = FakeEngine(
        EngineConfig(engine="fake", block_size=4, num_blocks=64, chunk_tokens=8),
        manifest=fake_manifest(vocab_size=VOCAB),
        hash_key=KEYS.prefix_hash,
    )
    ledger = WorkLedger(engine, "one")
    router = ledger.attach("router/1/1", lambda _: None)
    router.outbox.grant(100)
    return engine, ledger, router


def send(ledger: WorkLedger, router: AttachedRouter, number: int) -> None:
    request = make_request(range(number, number + 30))
    work = to_work(request, work_id=number, attempt=1, now=request.accepted_at, traceparent="", tracestate="")
    ledger.submit(router, pb.Dispatch(batch_id=number, work=[work]), request.accepted_at)


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
