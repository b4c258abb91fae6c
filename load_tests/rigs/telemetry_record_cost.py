"""What telling of a request costs the router beside answering it: metrics with the SDK, without, and the record of it.

A loop over what is called once a request and once a batch of one, with the answer of a request that went well; the
least of many short repetitions, since whatever else this machine does only adds to them. Nothing here is for each token
or message.
"""

from __future__ import annotations

import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from octavo.names import Span
from octavo.v1.inference_service_pb2 import GenerateRequest
from octavo.v1.types_pb2 import Delta, Prompt, TokenIds
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from cluster.telemetry_meter import Histograms, QuickMeterProvider, collecting
from load_tests.bars import Bar, at_most
from load_tests.notes import Notes, figure
from load_tests.rigs.bar_command import Settings, main
from load_tests.rigs.fuzz_local import InstantBackend
from load_tests.rigs.router_model import RIG_WORDS, rig_model
from router.answer import Answer
from router.config import ObserverConfig, RouterConfig
from router.intake import Intake
from router.metrics import RouterMetrics
from router.observer import RequestObserver
from router.types import Attempt, BatchShape, Cancel, Candidate, Decision, Request, Sink
from router.validation import Envelope
from router.wait_clock import WaitClock
from workers.types import Finish, FinishReason

MODEL: Final = "fake"
NUM_TOKENS: Final = (1, 64)
WITH_US, WITHOUT_US, RECORD_US = 25.0, 1.0, 10.0
CALLS: Final = 1_000
DECISION: Final = Decision(
    replica="one",
    rule="prefix",
    matched_tokens=48,
    candidates=tuple(Candidate(f"replica {number}", 48, 3.0, 16.0, 8.0, 16.0) for number in range(4)),
)
BATCH: Final = BatchShape(7, 1, 64)


class _Backend(InstantBackend):
    """Leaves what is submitted to the rig."""

    def submit(self, request: Request, sink: Sink) -> Cancel:
        return _do_nothing


async def measure(settings: Settings, notes: Notes) -> None:
    for _ in settings.rounds():
        for num_tokens in NUM_TOKENS:
            answer, metrics = await _answer(num_tokens), _metrics()
            counting, idle, remembering = (
                RequestObserver(ObserverConfig(max_kept_requests=number), kept_by)
                for number, kept_by in ((0, metrics), (0, None), (2_048, None))
            )
            notes.add(
                f"{num_tokens} tokens",
                with_sdk_us=_least_us(partial(_count, metrics, counting, answer), settings),
                without_us=_least_us(partial(idle.ended, answer), settings),
                record_us=_least_us(partial(remembering.ended, answer), settings),
                wait_us=_least_us(partial(_wait, WaitClock(0.0)), settings),
            )


def bars(notes: Notes) -> list[Bar]:
    found = []
    for num_tokens in NUM_TOKENS:
        what = f"{num_tokens} tokens"
        with_sdk, without, record, wait = (
            min(notes.of(what, name), default=None) for name in ("with_sdk_us", "without_us", "record_us", "wait_us")
        )
        together = None if record is None or wait is None else record + wait
        kept = f"why it waited and where it went: {figure(wait, 'us')}; the record: {figure(record, 'us')}"
        found += [
            at_most(f"metrics of an answer with {what}, with the SDK, us", with_sdk, WITH_US),
            at_most(f"metrics of an answer with {what}, without, us", without, WITHOUT_US),
            at_most(f"remembering an answer with {what}, us", together, RECORD_US, kept),
        ]
    return found


async def _answer(num_tokens: int) -> Answer:
    """Return the answer of a request that has ended well, over all of its way through the front."""
    intake = Intake(RouterConfig(), {MODEL: rig_model()}, _Backend(), router_id="rig")
    now = time.monotonic()
    envelope = Envelope(request_id="request", accepted_at=now, deadline=now + 600.0, is_session=True)
    answer = intake.open(envelope, name=Span.SESSION_REQUEST, model=MODEL, on_ready=_do_nothing)
    prompt = Prompt(token_ids=TokenIds(ids=RIG_WORDS[:64]))
    await intake.admit(answer, GenerateRequest(model=MODEL, prompt=prompt, max_tokens=num_tokens))
    assert answer.has_begun, answer.error
    answer.dispatched(Attempt(DECISION, 0.001, sent_at=time.monotonic(), batch=BATCH))
    answer.cached(48)
    for word in RIG_WORDS[:num_tokens]:
        answer.tokens(0, [word], ())
    finish = Finish(reason=FinishReason.LENGTH, queue_s=0.001, prefill_s=0.01, decode_s=0.1, num_steps=num_tokens)
    answer.finished(0, finish)
    answer.ended(None)
    answer.take(10_000, Delta)
    answer.close()
    return answer


def _metrics() -> RouterMetrics:
    """Return metrics as a router has them whose metrics are scraped and exported."""
    histograms = Histograms()
    readers = [collecting(reader, histograms)() for reader in (InMemoryMetricReader, PrometheusMetricReader)]
    provider = QuickMeterProvider(MeterProvider(readers, shutdown_on_exit=False), histograms)
    return RouterMetrics(provider.get_meter("rig"), [MODEL], max_tenants=50)


def _count(metrics: RouterMetrics, observer: RequestObserver, answer: Answer) -> None:
    metrics.batch_left(MODEL, BATCH)
    metrics.placed(MODEL, DECISION, after=None)
    observer.ended(answer)


def _wait(clock: WaitClock) -> None:
    """What the back notes of a request's wait and attempt."""
    clock.see(0.0, has_replica=True, has_room=True)
    wait = clock.wait(clock.begin(0.0, 0), 0.001)
    clock.gone()
    Attempt(DECISION, 0.001, sent_at=0.001, wait=wait, batch=BATCH)
    clock.see(0.001, has_replica=True, has_room=True)


def _least_us(call: Callable[[], object], settings: Settings) -> float:
    repetitions = 10 if settings.is_quick else 100
    return 1e6 * min(timeit.repeat(call, number=CALLS, repeat=repetitions)) / CALLS


def _do_nothing(*_: Any) -> None:
    """Nobody waits for this."""


if __name__ == "__main__":
    sys.exit(main("telemetry_record_cost", measure, bars))
