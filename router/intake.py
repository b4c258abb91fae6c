"""Where requests come in, from Generate and from Session alike, and where all their answers are kept count of.

`open` makes an `Answer`, `admit` checks the request, charges its tenant and hands it to the back; whatever goes wrong
ends that answer and nothing is raised. Owns the set of answers whose terminal was not sent, and the sweep that ends
those that nobody takes and breaks off writes that get stuck.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import grpc.aio
from octavo.names import Metadata, Reason
from octavo.v1.inference_service_pb2 import GenerateRequest

from router import status
from router.answer import Answer
from router.config import ObserverConfig, RouterConfig
from router.identity import Identities
from router.model import Models, ServedModel
from router.observer import RequestObserver
from router.pool_call import PoolCall
from router.pool_validation import PoolMessage, PoolValidator
from router.quotas import Charge, Quotas
from router.request_record import MAX_NAME, Recorded, RequestRecord
from router.span import RequestSpan
from router.stream_writer import StreamWriter, slow_consumer
from router.types import Backend, Cancel, Request
from router.validation import Envelope, Validator
from workers.errors import DeadlineError, OctavoError, UnavailableError

MAX_TIMEOUT_S = 30 * 24 * 3600.0
"""A client's longer timeout is as good as this one."""
MAX_SWEEP_S = 1.0


class Intake:
    """`identities` says what holds for a tenant; None: nothing is limited."""

    def __init__(
        self,
        config: RouterConfig,
        models: Models,
        backend: Backend,
        *,
        router_id: str,
        identities: Identities | None = None,
    ) -> None:
        self.config = config
        self.validator = Validator(config, models)
        self.is_draining = False
        self.num_accepted = 0
        self.num_ended = 0
        self._backend = backend
        self._router_id = router_id
        self._identities = identities or Identities()
        self.observer = RequestObserver(ObserverConfig(max_kept_requests=0))
        """Who is told of requests that have ended; nobody by default."""
        self._quotas = Quotas()
        self._charges: dict[Answer | PoolCall, Charge] = {}
        self._answers: set[Answer] = set()
        self._calls: set[PoolCall] = set()
        self._writers: set[StreamWriter] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._sweeper: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to sweep; `stop` must follow."""
        self._sweeper = asyncio.create_task(self._sweep_forever())

    async def stop(self) -> None:
        """End what is left, with UNAVAILABLE."""
        self.end_all()
        for answer in list(self._answers):
            answer.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.gather(self._sweeper, return_exceptions=True)

    def deadline(self, accepted_at: float, timeout_s: float | None) -> float:
        return accepted_at + min(self.config.default_timeout_s if timeout_s is None else timeout_s, MAX_TIMEOUT_S)

    def envelope(self, request_id: str, context: grpc.aio.ServicerContext[Any, Any]) -> Envelope:
        """Return what is known of a call that has just come in before its message is looked at, which calls it
        `request_id`, or nothing. Raises OctavoError for somebody who is not known."""
        now = time.monotonic()
        metadata = dict(context.invocation_metadata() or ())
        return Envelope(
            request_id=request_id or secrets.token_hex(8),
            accepted_at=now,
            deadline=self.deadline(now, left_s := context.time_remaining()),
            has_own_deadline=left_s is not None,
            identity=self._identities.identify(context),
            traceparent=str(metadata.get(Metadata.TRACEPARENT, "")),
            tracestate=str(metadata.get(Metadata.TRACESTATE, "")),
        )

    def open(
        self,
        envelope: Envelope,
        *,
        name: str,
        model: str,
        on_ready: Callable[[Answer], None],
        window: int | None = None,
    ) -> Answer:
        """Return the answer of a request that has just come in. `admit` or `close` must follow; `name`: the span's."""
        span = RequestSpan(name, envelope, model=model, router_id=self._router_id)
        answer = Answer(envelope, span, self, model=model, on_ready=on_ready, window=window)
        self._answers.add(answer)
        self._idle.clear()
        return answer

    async def admit(self, answer: Answer, message: GenerateRequest) -> None:
        """Check `message` and submit it; suspends only if `Validator.is_quick` says no."""
        if self.observer.keeps_prompts:
            answer.prompt = message.prompt
        try:
            identity = self._identities.current(answer.envelope.identity)
            if identity is not answer.envelope.identity:
                answer.envelope = replace(answer.envelope, identity=identity)
            self._refuse_if_hopeless(answer.envelope)
            accepted = await self.validator.accept(message, answer.envelope, traceparent=answer.span.traceparent)
            if not answer.has_failed:
                self._refuse_if_hopeless(answer.envelope)
                answer.begin(accepted, lambda request: self._submit(request, answer))
        except OctavoError as error:
            answer.fail(error)
        except Exception as error:
            answer.fail(status.unexpected(error))

    # Calls for numbers: many requests, one end.

    def open_pool(self, envelope: Envelope, *, name: str, model: str) -> PoolCall:
        """Return a call that has just come in; `close_pool` must follow."""
        span = RequestSpan(name, envelope, model=model, router_id=self._router_id)
        call = PoolCall(envelope, span, model=model)
        self._calls.add(call)
        self._idle.clear()
        return call

    async def admit_pool(self, call: PoolCall, message: PoolMessage) -> ServedModel:
        """Check `message` and submit its inputs. Raises OctavoError."""
        call.envelope = replace(call.envelope, identity=self._identities.current(call.envelope.identity))
        self._refuse_if_hopeless(call.envelope)
        validator = PoolValidator(self.validator, self.config.max_message_bytes)
        model, requests = await validator.accept(message, call.envelope, traceparent=call.span.traceparent)
        self._refuse_if_hopeless(call.envelope)
        self._charge(call, requests[0].tenant, sum(len(request.prompt) for request in requests))
        call.begin(requests, self._backend.submit)
        self.num_accepted += 1
        return model

    def close_pool(self, call: PoolCall) -> None:
        call.close()
        self._calls.discard(call)
        charge = self._charges.pop(call, None)
        if call.has_begun:
            self.num_ended += 1
            if charge is not None:
                self._quotas.settle(charge, call.num_used)
        elif charge is not None:
            self._quotas.refund(charge)
        self.observer.ended(call)
        if not self._answers and not self._calls:
            self._idle.set()

    def _submit(self, request: Request, answer: Answer) -> Cancel:
        """Charge the request to its tenant and hand it to the back."""
        self._charge(answer, request.tenant, max_num_tokens(request))
        try:
            return self._backend.submit(request, answer)
        except BaseException:
            if (charge := self._charges.pop(answer, None)) is not None:
                self._quotas.refund(charge)
            raise

    def _charge(self, answer: Answer | PoolCall, tenant: str, num_tokens: int) -> None:
        """Take what `answer` may use at most from its tenant's quota. Raises OverloadedError."""
        charge = self._quotas.charge(tenant, self._identities.terms(tenant), num_tokens, time.monotonic())
        if charge is not None:
            self._charges[answer] = charge

    def _refuse_if_hopeless(self, envelope: Envelope) -> None:
        if self.is_draining:
            raise UnavailableError("this router is draining; use another one", reason=Reason.DRAINING)
        late_s = time.monotonic() - envelope.deadline
        if late_s >= 0:
            raise DeadlineError(f"the deadline must be in the future, passed {late_s:.3f} s ago")

    def open_writer(self, context: grpc.aio.ServicerContext[Any, Any]) -> StreamWriter:
        """Return what the running task shall write to `context` with. `close_writer` must follow."""
        writer = StreamWriter(context, self.config.slow_consumer_s)
        self._writers.add(writer)
        return writer

    def close_writer(self, writer: StreamWriter) -> None:
        self._writers.discard(writer)

    @property
    def num_open(self) -> int:
        """Answers whose terminal was not sent."""
        return len(self._answers) + len(self._calls)

    def find(self, name: str, *, tenant: str) -> list[RequestRecord]:
        """Return the tenant's requests with this id, or of the trace with this id: those that have ended lately, then
        those that have not."""
        if not name:  # as is the trace of each request that has none
            return []
        now, trace_id = time.monotonic(), name.lower()
        found = self.observer.records.find(name, tenant=tenant)
        running: list[Recorded] = [*self._answers, *self._calls]
        for answer in running:
            envelope = answer.envelope
            is_meant = name[:MAX_NAME] == envelope.request_id[:MAX_NAME] or answer.span.traceparent[3:35] == trace_id
            if is_meant and envelope.identity.tenant == tenant:
                found.append(RequestRecord(answer, now, is_ended=False))
        return found

    async def wait_idle(self) -> None:
        """Return when no answer is left whose terminal was not sent."""
        await self._idle.wait()

    def end_all(self) -> None:
        """End every answer that has not ended, with UNAVAILABLE; the terminals have yet to be sent."""
        for answer in list(self._answers):
            answer.fail(UnavailableError("this router is stopping; use another one", reason=Reason.DRAINING))
        for call in list(self._calls):
            call.fail(UnavailableError("this router is stopping; use another one", reason=Reason.DRAINING))

    # What answers tell their owner.

    def begun(self, answer: Answer) -> None:
        self.num_accepted += 1

    def over(self, answer: Answer) -> None:
        self.num_ended += 1
        if (charge := self._charges.pop(answer, None)) is not None:
            self._quotas.settle(charge, answer.num_used)

    def closed(self, answer: Answer) -> None:
        self._answers.discard(answer)
        self.observer.ended(answer)
        if not self._answers and not self._calls:
            self._idle.set()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(min(MAX_SWEEP_S, self.config.slow_consumer_s / 4))
            self._sweep(time.monotonic())

    def _sweep(self, now: float) -> None:
        limit_s = self.config.slow_consumer_s
        for answer in list(self._answers):
            if answer.pending_since is not None and now - answer.pending_since > limit_s:
                answer.fail(slow_consumer(limit_s))
        for writer in self._writers:
            writer.check(now)


def max_num_tokens(request: Request) -> int:
    """Return what a request may use at most: its prompt, and what all its choices may still generate."""
    num_received = sum(map(len, request.received))
    return len(request.prompt) + request.n * request.max_tokens - num_received
