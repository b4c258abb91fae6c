"""InferenceService.Session: many requests of one client over one stream.

    reader task:   SessionRequest --> starts, then cancels and grants
    writer task:   everything available --> one SessionResponse (the only task that writes to the stream)

Each request has its own window, so one that nobody reads neither stalls its siblings nor grows memory. When the stream
breaks, its requests live on (`router/entries.py`). An answer whose Terminal was written shortly before the break is
kept for that too, since nobody knows whether it arrived.

Rules for a client: a Terminal with REQUEST_ID_IN_USE is about the Start that it answers, not about the live request; a
choice whose finish was seen is over, even if an attachment at its last token sends the finish again.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any

import grpc.aio
from google.protobuf.duration_pb2 import Duration
from octavo.names import Reason, Span
from octavo.v1.inference_service_pb2 import GoAway, Start

from router import status
from router.answer import Answer
from router.entries import Entries, Entry
from router.identity import Identity
from router.intake import Intake
from router.session_outbox import SessionOutbox
from router.stream_writer import StreamWriter
from router.validation import MAX_ID_BYTES, Envelope
from router.violations import shown
from workers.errors import (
    InvalidRequestError,
    NotFoundError,
    OctavoError,
    OverloadedError,
    Violation,
)

LINGER_S = 5.0
"""How long an answer is kept after its Terminal was written."""
MAX_LINGERING = 1_024
"""Answers that one session keeps so."""
MAX_TRACE_CHARACTERS = 4_096
"""Of a traceparent, and of a tracestate: both go on to a replica, in one message with those of other requests. (What
comes with a Generate call is bounded as its metadata.) A trace context that is longer is none."""
MAX_TURN_S = 0.004
"""How long what one message says is done before others have their turn: starts that are there already go to replicas
meanwhile, which would idle, and answers of other calls go out."""


class Session:
    """One stream."""

    def __init__(
        self, intake: Intake, entries: Entries, context: grpc.aio.ServicerContext[Any, Any], identity: Identity
    ) -> None:
        self._intake = intake
        self._entries = entries
        self._context = context
        self._identity = identity
        self._live: dict[str, Entry] = {}
        """Requests whose Terminal has yet to be written here."""
        self._outbox = SessionOutbox()
        self._ending: list[Entry] = []
        """Requests whose Terminal is in the message that is being written."""
        self._lingering: deque[tuple[float, Entry]] = deque()
        self._takes_no_more = False

    async def run(self) -> None:
        """Read and write until the client has finished and everything is written, or the stream breaks."""
        # Apart from the first message: if that got stuck, the call could not be aborted any more.
        await self._context.send_initial_metadata(())
        writer = self._intake.open_writer(self._context)
        reader = asyncio.create_task(self._read())
        is_broken = True
        try:
            await self._write(reader, writer)
            is_broken = False
        finally:
            self._intake.close_writer(writer)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            self._part(is_broken=is_broken)

    def go_away(self, message: GoAway) -> None:
        self._outbox.go_away(message)

    def finish(self) -> None:
        self._takes_no_more = True
        self._outbox.has_work.set()

    def release(self, entry: Entry) -> None:
        """A newer stream takes `entry` over."""
        if self._live.get(entry.request_id) is entry:
            del self._live[entry.request_id]
            self._outbox.discard(entry.request_id)

    def _part(self, *, is_broken: bool) -> None:
        """Give up everything that belongs to this stream. Idempotent."""
        told = [entry for entry in (*self._ending, *(entry for _, entry in self._lingering)) if entry.stream is self]
        # A call that breaks between two messages may look like one whose client has finished.
        grace_s = self._intake.config.session_grace_s if is_broken else LINGER_S
        self._entries.detach([*self._live.values(), *told], grace_s)
        self._live.clear()
        self._ending.clear()
        self._outbox.clear()
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
            began = time.monotonic()
            for start in message.starts:
                if time.monotonic() - began > MAX_TURN_S:
                    began = await _next_turn()
                if not self._outbox.has_room.is_set():
                    await self._outbox.has_room.wait()
                try:
                    await self._start(start)
                except OctavoError as error:
                    self._intake.observer.refused(start.request.model, error.reason)
                    self._outbox.refuse(start.request_id, error)
                except Exception as error:
                    self._outbox.refuse(start.request_id, status.unexpected(error))
            for cancel in message.cancels:
                if time.monotonic() - began > MAX_TURN_S:
                    began = await _next_turn()
                entry = self._live.get(cancel.request_id)
                if entry is not None:
                    entry.answer.cancel()
            for grant in message.grants:
                if time.monotonic() - began > MAX_TURN_S:
                    began = await _next_turn()
                entry = self._live.get(grant.request_id)
                if entry is not None:
                    entry.answer.grant(grant.tokens)
        self.finish()

    async def _start(self, start: Start) -> None:
        """Begin or attach. Raises OctavoError for a start that concerns no request."""
        size = len(start.request_id.encode())
        if not 1 <= size <= MAX_ID_BYTES:
            raise _invalid("request_id", f"must have 1 to {MAX_ID_BYTES} bytes, has {size}")
        limit = self._intake.config.max_choices
        if len(start.attach_offsets) > limit:
            raise _invalid("attach_offsets", f"must have at most {limit} numbers, has {len(start.attach_offsets)}")
        limit = self._intake.config.max_session_requests
        if len(self._live) >= limit:
            raise OverloadedError(f"a session must have at most {limit} live requests", reason=Reason.SESSION_LIMIT)
        entry = self._entries.find((self._identity.tenant, start.request_id))
        if entry is not None and start.attach_offsets and not _is_beginning(start, entry.answer):
            self._entries.drop(entry)
            entry = None
        if entry is not None and start.attach_offsets:
            self._attach(entry, start)
        elif entry is not None and not entry.is_delivered:
            raise InvalidRequestError(
                f"request_id: must be unique among live requests, {shown(start.request_id)} is in use",
                reason=Reason.REQUEST_ID_IN_USE,
                violations=[Violation("request_id", "must be unique among live requests")],
            )
        elif start.attach_offsets and _has_more_than_received(start):
            raise NotFoundError(
                f"this router knows no request {shown(start.request_id)} to attach to",
                reason=Reason.REQUEST_NOT_FOUND,
            )
        else:
            await self._begin(start)

    async def _begin(self, start: Start) -> None:
        now = time.monotonic()
        has_context = max(len(start.traceparent), len(start.tracestate)) <= MAX_TRACE_CHARACTERS
        envelope = Envelope(
            request_id=start.request_id,
            accepted_at=now,
            deadline=self._intake.deadline(now, _seconds(start.timeout) if start.HasField("timeout") else None),
            has_own_deadline=start.HasField("timeout"),
            identity=self._identity,
            traceparent=start.traceparent if has_context else "",
            tracestate=start.tracestate if has_context else "",
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
        self._entries.add(entry)
        self._live[start.request_id] = entry
        admission = self._intake.admit(answer, start.request)
        if self._intake.validator.is_quick(start.request):
            await admission
        else:
            self._entries.admit_later(admission)

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
        entry.move(self)
        self._live[start.request_id] = entry
        answer.attach(self._is_ready, window=start.window if start.HasField("window") else None, offsets=offsets)

    # Writing.

    def _is_ready(self, answer: Answer) -> None:
        self._outbox.add(self._live[answer.request_id])

    async def _write(self, reader: asyncio.Task[None], writer: StreamWriter) -> None:
        """Write what is available until nothing more can come. Raises what ends the stream."""
        outbox = self._outbox
        reader.add_done_callback(lambda _task: outbox.has_work.set())
        while True:
            if outbox.is_empty:
                if reader.done() and (error := reader.exception()) is not None:
                    await self._abort(error, reader)
                if self._takes_no_more and not self._live:
                    return
                outbox.has_work.clear()
                await outbox.has_work.wait()
                continue
            message, ended = outbox.take()
            self._end(ended)
            try:
                await writer.write(message)
            except OverloadedError as error:
                await self._abort(error, reader)
            self._written()
            if outbox.has_ready:
                await asyncio.sleep(0)  # a write may complete without suspending, and others want to run too

    async def _abort(self, error: BaseException, reader: asyncio.Task[None]) -> None:
        reader.cancel()
        self._part(is_broken=True)
        await status.abort(self._context, error if isinstance(error, OctavoError) else status.unexpected(error))

    def _end(self, entries: list[Entry]) -> None:
        """Their Terminals are in the message: nothing may change them any more, or be told after them. The client may
        have them before the message counts as written, and use their ids again."""
        for entry in entries:
            entry.is_delivered = True
            del self._live[entry.request_id]
            entry.answer.close()
            entry.answer.detach()
        self._ending += entries

    def _written(self) -> None:
        """The message has left; those that it ended are kept for a while."""
        now = time.monotonic()
        for entry in self._ending:
            # One that was attached again meanwhile has its Terminal still before it.
            if entry.stream is self and self._live.get(entry.request_id) is not entry:
                self._lingering.append((now, entry))
        self._ending.clear()
        while self._lingering and (len(self._lingering) > MAX_LINGERING or now - self._lingering[0][0] > LINGER_S):
            _, entry = self._lingering.popleft()
            if entry.stream is self and entry.is_delivered:
                self._entries.forget(entry)


async def _next_turn() -> float:
    """Let others have theirs; return when it begins."""
    await asyncio.sleep(0)
    return time.monotonic()


def _num_received(start: Start, index: int) -> int:
    """Return how many tokens of a choice the client has from before this request."""
    lists = start.request.received_token_ids
    return len(lists[index].ids) if index < len(lists) else 0


def _is_beginning(start: Start, answer: Answer) -> bool:
    """Whether the received tokens that come with an attachment are those of `answer`. If not, the client has gone on
    with the request at another router meanwhile, which chose other tokens."""
    lists = start.request.received_token_ids[: answer.num_choices]
    return all(list(answer.known(i)[: len(each.ids)]) == list(each.ids) for i, each in enumerate(lists))


def _has_more_than_received(start: Start) -> bool:
    """Whether the client has some of the answer to this very request."""
    return any(offset > _num_received(start, i) for i, offset in enumerate(start.attach_offsets))


def _seconds(timeout: Duration) -> float:
    return timeout.seconds + timeout.nanos / 1e9


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(f"{field}: {description}", violations=[Violation(field, description)])
