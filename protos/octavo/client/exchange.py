"""One request and its answer, over as many Sessions as it takes: what came, what may still come, how it ended.

Pure: knows neither asyncio nor a clock. The state that makes an answer exact across broken Sessions and lost routers is
here: per choice the tokens that came (a router that has the answer attaches behind them, any other goes on after them),
and the window:

    tokens that the router may still send + tokens buffered here + tokens read and not yet granted == window

so a consumer that does not read costs at most one window of memory, and nobody else's time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from google.protobuf import duration_pb2

from octavo.client.answer import Decision, Delta, Finish, Usage
from octavo.client.errors import CallError, InternalError
from octavo.names import Reason
from octavo.v1 import inference_service_pb2 as pb
from octavo.v1 import types_pb2

_MAX_CHOICES = 1024
"""More than any router gives; a request for more is refused, and nothing is kept for what it asks."""
_MAX_TOKEN_BYTES = 5
"""Of a token id, in a message."""


class Exchange:
    """`changed` is called after each arrival and at the end; it must not raise. `deadline` is on the clock whose `now`
    is given to `start`, in seconds."""

    def __init__(
        self,
        request_id: str,
        request: pb.GenerateRequest,
        *,
        window: int,
        deadline: float | None,
        changed: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self.request = request
        self.deadline = deadline
        self.traceparent = ""
        self.tracestate = ""
        self.num_bytes = request.ByteSize()
        """That its request takes in a Start, at most: what came of the answer goes with it."""
        self.is_started = False
        """A Start was handed to a Session, so a router may know of the request."""
        self.cancelled_at: float | None = None
        """When nobody wanted the answer any more; the router may still have to be told."""
        self.is_ended = False
        self.error: CallError | None = None
        self.usage: Usage | None = None
        self.decision: Decision | None = None
        num_choices = min(max(1, request.n), _MAX_CHOICES)
        self.finishes: list[Finish | None] = [None] * num_choices
        self._window = window
        self._changed = changed
        self._known = [list(each.ids) for each in request.received_token_ids[:num_choices]]
        """All tokens of each choice."""
        self._known += [[] for _ in range(num_choices - len(self._known))]
        self._before = self._received
        """Tokens of each choice that were there before this request; the router counts them too."""
        self._buffer: deque[Delta] = deque()
        self._num_buffered = 0
        self._num_ungranted = 0

    @property
    def has_tokens(self) -> bool:
        """Whether any of the answer has come."""
        return self._received != self._before or any(self.finishes)

    @property
    def _received(self) -> list[int]:
        return list(map(len, self._known))

    @property
    def num_tokens(self) -> int:
        """Of all choices, those included that were there before."""
        return sum(map(len, self._known))

    @property
    def is_whole(self) -> bool:
        """Every choice has its last delta, whether or not the Terminal came."""
        return all(self.finishes)

    @property
    def can_go_on(self) -> bool:
        """Whether a router that does not know this answer could give what is missing of it. Of a whole one that is the
        Terminal, which nobody else has. With best_of the choices were picked from others that never came: nobody else
        would pick the same."""
        is_picked = self.request.best_of > len(self.finishes)
        return not (self.is_whole or (is_picked and self.has_tokens))

    @property
    def num_buffered_tokens(self) -> int:
        return self._num_buffered

    def start(self, now: float) -> pb.Start:
        """Return the Start for the next Session: the first one, or one that goes on where this answer stopped."""
        start = pb.Start(
            request_id=self.request_id,
            request=self._rest() if self.has_tokens and self.can_go_on else self.request,
            traceparent=self.traceparent,
            tracestate=self.tracestate,
            window=self._window - self._num_buffered,
            attach_offsets=self._received if self.is_started else (),
        )
        if self.deadline is not None:
            nanos = max(0, round((self.deadline - now) * 1e9))
            start.timeout.CopyFrom(duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9))
        self.is_started = True
        self._num_ungranted = 0
        return start

    def _rest(self) -> pb.GenerateRequest:
        """Return the request for what is still to come, for a router that does not know it."""
        request = pb.GenerateRequest()
        request.CopyFrom(self.request)
        del request.received_token_ids[:]
        for token_ids in self._known:
            request.received_token_ids.add(ids=token_ids)
        return request

    def turned_away(self) -> None:
        """The router has ended the request although it is not done: the next Start begins a new one, there or
        elsewhere."""
        self.is_started = False

    def deliver(self, delta: types_pb2.Delta) -> None:
        """Take in what a router sent; what is already here is dropped. Raises InternalError if tokens are missing."""
        index, offset, num_tokens = delta.index, delta.token_offset, len(delta.token_ids)
        if index >= len(self._known):
            raise InternalError(f"the router sent choice {index} of {len(self._known)}", reason=Reason.INTERNAL)
        received = len(self._known[index])
        if self.finishes[index] is not None or (num_tokens and offset + num_tokens <= received):
            return
        if offset != received:
            raise InternalError(
                f"the router sent tokens {offset} to {offset + num_tokens} of choice {index}, {received} are here",
                reason=Reason.INTERNAL,
            )
        value = Delta.from_wire(delta)
        self._known[index] += value.token_ids
        self.num_bytes += _MAX_TOKEN_BYTES * num_tokens
        self.finishes[index] = value.finish
        self._buffer.append(value)
        self._num_buffered += num_tokens
        self._changed()

    def take(self) -> Delta | None:
        """Return the next delta to read, None if there is none yet. Ask `take_grant` afterwards."""
        if not self._buffer:
            return None
        delta = self._buffer.popleft()
        self._num_buffered -= len(delta.token_ids)
        self._num_ungranted += len(delta.token_ids)
        return delta

    def take_grant(self) -> int:
        """Return how many tokens to grant now: 0, or at least half a window, so that grants stay few."""
        if self.is_ended or self._num_ungranted * 2 < self._window:
            return 0
        granted, self._num_ungranted = self._num_ungranted, 0
        return granted

    def account(self, terminal: pb.Terminal) -> None:
        """Keep what a Terminal tells of the request, whatever its code."""
        if terminal.HasField("usage"):
            self.usage = Usage.from_wire(terminal.usage)
        if terminal.HasField("decision"):
            self.decision = Decision.from_wire(terminal.decision)

    def end(self, error: CallError | None) -> None:
        """Nothing follows. What is buffered can still be read, then `error` counts. The first end stands."""
        if self.is_ended:
            return
        self.is_ended = True
        self.error = error
        self._changed()

    def discard(self) -> None:
        """Forget what nobody will read."""
        self._buffer.clear()
        self._num_buffered = 0
