"""InferenceService.Session: many requests of one client over one stream, and what outlives that stream.

    reader task:   SessionRequest --> starts, then cancels and grants
    writer task:   everything available --> one SessionResponse (the only task that writes to the stream)

Each request has its own window, so one that nobody reads neither stalls its siblings nor grows memory. When a stream
breaks, its requests live on for ``session_grace_s``, in which the same tenant may attach again with the same id, also
from a newer stream while the older one does not know yet that it is dead: the newer one wins. An answer whose Terminal
was written shortly before the break is kept for that too, since nobody knows whether it arrived.

Rules for a client: a Terminal with REQUEST_ID_IN_USE is about the Start that it answers, not about the live request; a
choice whose finish was seen is over, even if an attachment at its last token sends the finish again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine
from functools import partial
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from octavo.names import Reason, Span
from octavo.v1.inference_service_pb2 import Event, GoAway, SessionResponse, Start, Terminal
from octavo.v1.types_pb2 import Delta

from router import status
from router.answer import Answer, decision_message
from router.identity import Identity, identify
from router.intake import Intake, slow_consumer
from router.validation import MAX_ID_BYTES, Envelope
from router.violations import shown
from workers.errors import (
    InvalidRequestError,
    NotFoundError,
    OctavoError,
    OverloadedError,
    Violation,
)

MAX_MESSAGE_TOKENS = 32_768
"""In one message, which keeps it far below a client's usual limit of 4 MiB."""
EVENT_TOKENS = 32
"""What an event weighs beside its tokens."""
MAX_REFUSALS = 1_024
"""Refused starts that wait to be written; with more, nothing is read."""
LINGER_S = 5.0
"""How long an answer is kept after its Terminal was written."""
MAX_LINGERING = 1_024
"""Answers that one session keeps so."""


class Entry:
    """A request of a Session and the stream that it belongs to now, if any."""

    __slots__ = ("answer", "is_delivered", "key", "num_detached", "session")

    def __init__(self, key: tuple[str, str], answer: Answer, session: Session) -> None:
        self.key = key
        self.answer = answer
        self.session: Session | None = session
        self.is_delivered = False
        """Its Terminal was written, and nobody has attached since."""
        self.num_detached = 0
        """How often it has lost its stream; tells a grace that is over from one that began later."""


class Sessions:
    """All Sessions of a router, and the requests that have come in over them."""

    def __init__(self, intake: Intake) -> None:
        self.intake = intake
        self._entries: dict[tuple[str, str], Entry] = {}
        self._open: set[Session] = set()
        self._admissions: set[asyncio.Task[None]] = set()
        self._graces: set[asyncio.TimerHandle] = set()
        self._go_away: GoAway | None = None

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_known(self) -> int:
        """Requests that a client could attach to."""
        return len(self._entries)

    async def serve(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Serve one Session call to its end."""
        session = Session(self, context, identify(context))
        self._open.add(session)
        if self._go_away is not None:
            session.go_away(self._go_away)
        try:
            await session.run()
        finally:
            self._open.discard(session)

    def go_away(self, grace_s: float, reason: str) -> None:
        """Tell every client, also those that still come, to start no more here."""
        self._go_away = GoAway(grace=status.duration(grace_s), reason=reason)
        for session in self._open:
            session.go_away(self._go_away)

    def finish(self) -> None:
        """Let every Session end as soon as nothing is left to write."""
        for session in self._open:
            session.finish()

    async def stop(self) -> None:
        """Forget everything; no Session may be running any more."""
        for handle in self._graces:
            handle.cancel()
        self._graces.clear()
        for task in self._admissions:
            task.cancel()
        await asyncio.gather(*self._admissions, return_exceptions=True)
        for entry in self._entries.values():
            entry.answer.close()
        self._entries.clear()

    def find(self, key: tuple[str, str]) -> Entry | None:
        return self._entries.get(key)

    def add(self, entry: Entry) -> None:
        self._entries[entry.key] = entry

    def forget(self, entry: Entry) -> None:
        """Nobody can attach to it any more."""
        if self._entries.get(entry.key) is entry:
            del self._entries[entry.key]
        entry.answer.close()

    def admit_later(self, admission: Coroutine[Any, Any, None]) -> None:
        """Run an admission that takes its time; it does not end with the session."""
        task = asyncio.create_task(admission)
        self._admissions.add(task)
        task.add_done_callback(self._admissions.discard)

    def detached(self, entries: list[Entry], grace_s: float) -> None:
        """These have lost their stream; unless they find another one, they end when the grace is over."""
        counts = []
        if not entries:
            return
        for entry in entries:
            entry.session = None
            entry.num_detached += 1
            entry.answer.detach()
            counts.append((entry, entry.num_detached))

        def grace_is_over() -> None:
            self._graces.discard(handle)
            for entry, count in counts:
                if entry.session is None and entry.num_detached == count:
                    self.forget(entry)

        handle = asyncio.get_running_loop().call_later(grace_s, grace_is_over)
        self._graces.add(handle)


class Session:
    """One stream."""

    def __init__(self, sessions: Sessions, context: grpc.aio.ServicerContext[Any, Any], identity: Identity) -> None:
        self._sessions = sessions
        self._intake = sessions.intake
        self._context = context
        self._identity = identity
        self._live: dict[str, Entry] = {}
        """Requests whose Terminal has yet to be written here."""
        self._ready: dict[str, Entry] = {}
        """Those of them that have something to write, the one that has waited longest first."""
        self._refusals: deque[Event] = deque()
        self._ending: list[Entry] = []
        """Requests whose Terminal is in the message that is being written."""
        self._lingering: deque[tuple[float, Entry]] = deque()
        self._pending_go_away: GoAway | None = None
        self._has_work = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._takes_no_more = False

    async def run(self) -> None:
        """Read and write until the client has finished and everything is written, or the stream breaks."""
        # Apart from the first message: if that got stuck, the call could not be aborted any more.
        await self._context.send_initial_metadata(())
        reader = asyncio.create_task(self._read())
        is_broken = True
        try:
            await self._write(reader)
            is_broken = False
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._part(is_broken=is_broken)

    def go_away(self, message: GoAway) -> None:
        self._pending_go_away = message
        self._has_work.set()

    def finish(self) -> None:
        self._takes_no_more = True
        self._has_work.set()

    def release(self, entry: Entry) -> None:
        """A newer stream takes `entry` over."""
        if self._live.get(entry.answer.request_id) is entry:
            del self._live[entry.answer.request_id]
            self._ready.pop(entry.answer.request_id, None)

    def _part(self, *, is_broken: bool) -> None:
        """Give up everything that belongs to this stream. Idempotent."""
        told = [entry for entry in (*self._ending, *(entry for _, entry in self._lingering)) if entry.session is self]
        # A call that breaks between two messages may look like one whose client has finished.
        grace_s = self._intake.config.session_grace_s if is_broken else LINGER_S
        self._sessions.detached([*self._live.values(), *told], grace_s)
        self._live.clear()
        self._ending.clear()
        self._ready.clear()
        self._lingering.clear()

    # Reading.

    async def _read(self) -> None:
        """Take messages until the client sends no more. Raises OctavoError for what is no message."""
        while True:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                break
            if isinstance(message, OctavoError):
                raise message
            for start in message.starts:
                await self._has_room.wait()
                try:
                    await self._start(start)
                except OctavoError as error:
                    self._refuse(start.request_id, error)
                except Exception as error:
                    self._refuse(start.request_id, status.unexpected(error))
            for cancel in message.cancels:
                entry = self._live.get(cancel.request_id)
                if entry is not None:
                    entry.answer.cancel()
            for grant in message.grants:
                entry = self._live.get(grant.request_id)
                if entry is not None:
                    entry.answer.grant(grant.tokens)
        self.finish()

    async def _start(self, start: Start) -> None:
        """Begin or attach. Raises OctavoError for a start that concerns no request."""
        size = len(start.request_id.encode())
        if not 1 <= size <= MAX_ID_BYTES:
            raise _invalid("request_id", f"must have 1 to {MAX_ID_BYTES} bytes, has {size}")
        limit = self._intake.config.max_session_requests
        if len(self._live) >= limit:
            raise OverloadedError(f"a session must have at most {limit} live requests", reason=Reason.SESSION_LIMIT)
        entry = self._sessions.find((self._identity.tenant, start.request_id))
        if entry is not None and start.attach_offsets:
            self._attach(entry, start)
        elif entry is not None and not entry.is_delivered:
            raise InvalidRequestError(
                f"request_id: must be unique among live requests, {shown(start.request_id)} is in use",
                reason=Reason.REQUEST_ID_IN_USE,
                violations=[Violation("request_id", "must be unique among live requests")],
            )
        elif _has_more_than_received(start):
            raise NotFoundError(
                f"this router knows no request {shown(start.request_id)} to attach to",
                reason=Reason.REQUEST_NOT_FOUND,
            )
        else:
            await self._begin(start)

    async def _begin(self, start: Start) -> None:
        now = time.monotonic()
        envelope = Envelope(
            request_id=start.request_id,
            accepted_at=now,
            deadline=self._intake.deadline(now, _seconds(start.timeout) if start.HasField("timeout") else None),
            identity=self._identity,
            traceparent=start.traceparent,
            tracestate=start.tracestate,
            is_session=True,
        )
        answer = self._intake.open(
            envelope,
            name=Span.SESSION_REQUEST,
            model=start.request.model,
            on_ready=self._is_ready,
            window=start.window if start.HasField("window") else None,
        )
        entry = Entry((self._identity.tenant, start.request_id), answer, self)
        self._sessions.add(entry)
        self._live[start.request_id] = entry
        admission = self._intake.admit(answer, start.request)
        if self._intake.validator.is_quick(start.request):
            await admission
        else:
            self._sessions.admit_later(admission)

    def _attach(self, entry: Entry, start: Start) -> None:
        answer = entry.answer
        offsets = list(start.attach_offsets)
        if answer.num_choices and len(offsets) != answer.num_choices:
            raise _invalid("attach_offsets", f"must have {answer.num_choices} numbers, has {len(offsets)}")
        for i, offset in enumerate(offsets):
            known = answer.offsets(i) if answer.num_choices else range(_num_received(start, i) + 1)
            if offset not in known:
                rule = (
                    f"must be in [{known.start}, {known.stop - 1}], from the tokens of received_token_ids to all so far"
                )
                raise _invalid(f"attach_offsets[{i}]", f"{rule}, is {offset}")
        if entry.session is not None:
            entry.session.release(entry)
        entry.session = self
        entry.is_delivered = False
        self._live[start.request_id] = entry
        answer.attach(self._is_ready, window=start.window if start.HasField("window") else None, offsets=offsets)

    def _refuse(self, request_id: str, error: OctavoError) -> None:
        self._refusals.append(Event(request_id=request_id, terminal=status.to_terminal(error)))
        if len(self._refusals) >= MAX_REFUSALS:
            self._has_room.clear()
        self._has_work.set()

    # Writing.

    def _is_ready(self, answer: Answer) -> None:
        self._ready[answer.request_id] = self._live[answer.request_id]
        self._has_work.set()

    async def _write(self, reader: asyncio.Task[None]) -> None:
        """Write what is available until nothing more can come. Raises what ends the stream."""
        reader.add_done_callback(lambda _task: self._has_work.set())
        limit_s = self._intake.config.slow_consumer_s
        while True:
            message = self._next_message()
            if message is None:
                if reader.done() and (error := reader.exception()) is not None:
                    await self._abort(error, reader)
                if self._takes_no_more and not self._live:
                    return
                self._has_work.clear()
                await self._has_work.wait()
                continue
            try:
                async with asyncio.timeout(limit_s):
                    await self._context.write(message)
            except TimeoutError:
                await self._abort(slow_consumer(limit_s), reader)
            self._written()
            if self._ready:
                await asyncio.sleep(0)  # a write may complete without suspending, and others want to run too

    async def _abort(self, error: BaseException, reader: asyncio.Task[None]) -> None:
        reader.cancel()
        self._part(is_broken=True)
        await status.abort(self._context, error if isinstance(error, OctavoError) else status.unexpected(error))

    def _next_message(self) -> SessionResponse | None:
        """Return everything available, up to a bound; None if there is nothing."""
        message = SessionResponse()
        budget = MAX_MESSAGE_TOKENS
        if self._pending_go_away is not None:
            message.go_away.CopyFrom(self._pending_go_away)
            self._pending_go_away = None
        elif not self._ready and not self._refusals:
            return None
        while self._refusals and budget > 0:
            message.events.append(self._refusals.popleft())
            budget -= EVENT_TOKENS
        if not self._refusals:
            self._has_room.set()
        ready, events = self._ready, message.events
        while ready and budget > 0:
            request_id = next(iter(ready))
            entry = ready.pop(request_id)
            answer = entry.answer
            budget -= EVENT_TOKENS + answer.take(budget, partial(_new_delta, message, request_id))
            if answer.is_complete:
                events.add(request_id=request_id, terminal=_terminal(answer))
                self._end(entry)
            elif answer.has_output:
                ready[request_id] = entry
        return message

    def _end(self, entry: Entry) -> None:
        """Its Terminal is in the message: nothing may change it any more, or be told after it."""
        del self._live[entry.answer.request_id]
        entry.answer.close()
        entry.answer.detach()
        self._ending.append(entry)

    def _written(self) -> None:
        """The message has left; those that it ended are kept for a while."""
        now = time.monotonic()
        for entry in self._ending:
            if entry.session is self:
                entry.is_delivered = True
                self._lingering.append((now, entry))
        self._ending.clear()
        while self._lingering and (len(self._lingering) > MAX_LINGERING or now - self._lingering[0][0] > LINGER_S):
            _, entry = self._lingering.popleft()
            if entry.session is self and entry.is_delivered:
                self._sessions.forget(entry)


def _new_delta(message: SessionResponse, request_id: str) -> Delta:
    return message.events.add(request_id=request_id).delta


def _terminal(answer: Answer) -> Terminal:
    terminal = status.to_terminal(answer.error)
    terminal.usage.CopyFrom(answer.usage())
    if answer.decision is not None:
        terminal.replica = answer.decision.replica
        terminal.decision.CopyFrom(decision_message(answer.decision))
    return terminal


def _num_received(start: Start, index: int) -> int:
    """Return how many tokens of a choice the client has from before this request."""
    lists = start.request.received_token_ids
    return len(lists[index].ids) if index < len(lists) else 0


def _has_more_than_received(start: Start) -> bool:
    """Whether the client has some of the answer to this very request."""
    return any(offset > _num_received(start, i) for i, offset in enumerate(start.attach_offsets))


def _seconds(timeout: Duration) -> float:
    return timeout.seconds + timeout.nanos / 1e9


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {description}", violations=[Violation(field, description)])
