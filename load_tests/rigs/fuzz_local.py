"""Stand-ins for what is around a router's front when it is fuzzed without sockets: a call, and a back.

The back makes each request the replica's form of a work, which must take it, and answers in the next turn of the loop,
with a few tokens a choice; it says no more of a request or a choice that was cancelled, as the contract of
`router.types` demands.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
from octavo.internal.v1 import data_plane_pb2 as pb

from router.signal import ModelSignal
from router.types import Attempt, Backlog, Cancel, Decision, ModelStanding, ReplicaView, Request, Sink
from router.wire import to_work
from workers.errors import CancelledRequestError
from workers.types import Finish, FinishReason, TokenLogprobs
from workers.wire import from_work

MAX_TOKENS: Final = 5
"""Of a choice's answer."""
CALL_S: Final = 2.0


class LocalAbortError(Exception):
    """The call has ended with a status; see `LocalContext.code`."""


class LocalContext:
    """A call of which `messages` are all that the client says; what is written to it is in `written`."""

    def __init__(self, messages: Sequence[object] = ()) -> None:
        self.code = "OK"
        self.text = ""
        self.written: list[Any] = []
        self._messages = deque(messages)

    async def read(self) -> object:
        await asyncio.sleep(0)
        return self._messages.popleft() if self._messages else grpc.aio.EOF

    async def write(self, message: Any) -> None:
        self.written.append(message)
        await asyncio.sleep(0)

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: object = ()) -> NoReturn:
        self.code, self.text = code.name, details
        raise LocalAbortError

    async def send_initial_metadata(self, metadata: object) -> None:
        """There is nobody to see them."""

    def set_trailing_metadata(self, metadata: object) -> None:
        """There is nobody to see them."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def time_remaining(self) -> float:
        return CALL_S


class InstantBackend:
    """Implements `router.types.Backend`."""

    def submit(self, request: Request, sink: Sink) -> Cancel:
        now = time.monotonic()
        context = {"traceparent": request.traceparent, "tracestate": request.tracestate}
        sent = to_work(request, work_id=1, attempt=1, now=now, **context).SerializeToString()
        from_work(pb.Work.FromString(sent), "router", now)
        flight = _Flight(request, sink)
        asyncio.get_running_loop().call_soon(flight.answer)
        return flight.cancel

    def replicas(self) -> Sequence[ReplicaView]:
        return ()

    def standing(self, model: str) -> ModelStanding:
        return ModelStanding()

    def backlog(self) -> Backlog:
        return Backlog(num_queued_requests=0, num_queued_tokens=0, num_running_requests=0, max_queued_tokens=0)

    def signal(self, model: str) -> ModelSignal:
        return ModelSignal()


class _Flight:
    def __init__(self, request: Request, sink: Sink) -> None:
        self._request = request
        self._sink = sink
        self._open = set(range(request.n))
        self._is_over = False

    def answer(self) -> None:
        if self._is_over:
            return
        self._sink.dispatched(Attempt(Decision(replica="instant", rule="only"), 0.0))
        self._sink.cached(0)
        for index in range(self._request.n):
            self._choose(index)
        self._end_if_whole()

    def cancel(self, index: int | None = None) -> None:
        if self._is_over:
            return
        if index is None:
            self._is_over = True
            self._sink.ended(CancelledRequestError("cancelled"))
        else:
            self._open.discard(index)
            self._end_if_whole()

    def _choose(self, index: int) -> None:
        request = self._request
        num_received = len(request.received[index]) if request.received else 0
        tokens = [300 + number for number in range(min(MAX_TOKENS, request.max_tokens - num_received))]
        logprobs = [] if request.num_logprobs is None else [TokenLogprobs(-1.0, ((1, -1.0),)) for _ in tokens]
        if tokens and self._is_wanted(index):
            self._sink.tokens(index, tokens, logprobs)
        if self._is_wanted(index):
            self._open.remove(index)
            self._sink.finished(index, Finish(reason=FinishReason.LENGTH))

    def _is_wanted(self, index: int) -> bool:
        return not self._is_over and index in self._open

    def _end_if_whole(self) -> None:
        if not self._is_over and not self._open:
            self._is_over = True
            self._sink.ended(None)
