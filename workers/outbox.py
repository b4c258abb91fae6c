"""What one router has not been told yet, merged into as few messages as it takes: pure, one per attached router.

Deltas of one work and choice become one delta, KV events their net effect, loads the last one; so what waits for a
slow router is bounded by its works and by the size of the block pool. Tokens of which nothing else is to be said, as of
most, go in columns, if the router knows these. `take` needs credit, and says everything at once that a message can
carry: numbers of many works may be too much for one. Knows no gRPC stream, no clock and no engine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from octavo.internal.v1 import data_plane_pb2 as pb

from workers.types import KvEvent, KvEventKind, Load, Resident, TokenDelta
from workers.wire import add_to, fill_load, fill_tokens, num_bytes

MAX_DELTA_BYTES: Final = 16 * 1024 * 1024
"""Of the deltas in a message. The data plane's limit is four times that, for one delta that is larger, and for columns
and KV events beside them. A larger message would end the stream, and all works on it, each time again."""


class Outbox:
    """`resident` returns the hashes of all resident blocks; it is asked when the events that wait outgrow the pool.
    `in_columns`: the router knows `WorkTokens`."""

    def __init__(
        self, *, max_kv_events: int, resident: Callable[[], Iterable[bytes]], in_columns: bool = False
    ) -> None:
        self._max_kv_events = max_kv_events
        self._resident = resident
        self._in_columns = in_columns
        self._full: deque[pb.AttachResponse] = deque()
        """Deltas that go before those of `_response`, for which there was no more room in their message."""
        self._response = pb.AttachResponse()
        """With the deltas that wait, those of `_deltas`, of `_size` bytes at most."""
        self._size = 0
        self._deltas: dict[tuple[int, int], pb.WorkDelta] = {}
        self._tokens: dict[int, list[int]] = {}
        """By work: tokens of the first choice, of which nothing else is to be said; none of these is in `_deltas`."""
        self._kv = PendingKv()
        self._load: Load | None = None
        self._of_engine: Resident | None = None
        self._last_batch_id = 0
        self._credit = 0
        self._draining: pb.Draining | None = None

    @property
    def has_deltas(self) -> bool:
        return bool(self._full or self._deltas or self._tokens)

    @property
    def num_deltas(self) -> int:
        """Choices of which something waits to be told, other than tokens alone."""
        return len(self._deltas) + sum(len(full.step_batch.deltas) for full in self._full)

    @property
    def is_empty(self) -> bool:
        return not self.has_deltas and self._load is None and self._draining is None and not self._kv

    @property
    def can_take(self) -> bool:
        return self._draining is not None or (self._credit > 0 and not self.is_empty)

    def grant(self, num_batches: int) -> None:
        self._credit += num_batches

    def add(self, delta: TokenDelta) -> None:
        size = num_bytes(delta)
        if self._size + size > MAX_DELTA_BYTES and self._deltas:
            self._full.append(self._response)
            self._response, self._deltas, self._size = pb.AttachResponse(), {}, 0
        self._size += size
        number, index = delta.work_id.number, delta.index
        message = self._deltas.get((number, index))
        if message is None:
            message = self._response.step_batch.deltas.add(work_id=number, index=index)
            self._deltas[number, index] = message
            if index == 0 and (waiting := self._tokens.pop(number, None)) is not None:
                message.token_ids.extend(waiting)
        add_to(message, delta)

    def add_tokens(self, number: int, token_ids: Sequence[int]) -> None:
        """Tell of tokens of a work's first choice, of which nothing else is to be said: the quick way."""
        waiting = self._tokens.get(number)
        if waiting is not None:
            waiting += token_ids
        elif (message := self._deltas.get((number, 0))) is not None:
            message.token_ids.extend(token_ids)
        else:
            self._tokens[number] = list(token_ids)

    def add_kv_events(self, events: Iterable[KvEvent]) -> None:
        self._kv.extend(events)
        if len(self._kv) > self._max_kv_events:
            self._kv.restart(self._resident())

    def report(self, load: Load, last_batch_id: int, of_engine: Resident | None = None) -> None:
        """`load` counts the works of this router's dispatches up to `last_batch_id`. `of_engine` is what the engine has
        after all KV events that were added; None if that is not known."""
        self._load = load
        self._of_engine = of_engine
        self._last_batch_id = last_batch_id

    def announce_draining(self, grace_s: float) -> None:
        self._draining = pb.Draining(grace_us=round(grace_s * 1e6))

    def take(self) -> pb.AttachResponse:
        """Return all that waits as one message, or as much of it as fits, and spend a credit, if `can_take`."""
        assert self.can_take
        if self._credit > 0 and self._full:
            self._credit -= 1
            response = self._full.popleft()
        elif self._credit > 0:
            self._credit -= 1
            response = self._response
            self._fill(response.step_batch)
            self._response, self._deltas, self._tokens, self._load = pb.AttachResponse(), {}, {}, None
            self._size = 0
        else:
            response = pb.AttachResponse()
        if self._draining is not None:
            response.draining.CopyFrom(self._draining)
            self._draining = None
        return response

    def _fill(self, batch: pb.StepBatch) -> None:
        """Add all that waits beside the deltas, which are in there."""
        batch.SetInParent()
        if self._tokens and self._in_columns:
            fill_tokens(batch.tokens, self._tokens)
        else:
            for number, token_ids in self._tokens.items():
                batch.deltas.add(work_id=number, token_ids=token_ids)
        if self._load is not None:
            fill_load(batch.load, self._load)
            batch.step = self._load.num_steps
            batch.last_batch_id = self._last_batch_id
            if self._of_engine is not None:
                batch.resident.num_blocks, batch.resident.digest = self._of_engine
        if self._kv:
            batch.kv_events.CopyFrom(self._kv.take())


class PendingKv:
    """The net effect of KV events: what to remove (or everything), then what to add."""

    __slots__ = ("_cleared", "_removed", "_stored")

    def __init__(self) -> None:
        self._cleared = False
        self._removed: dict[bytes, None] = {}
        self._stored: dict[bytes, None] = {}

    def __len__(self) -> int:
        return len(self._removed) + len(self._stored)

    def __bool__(self) -> bool:
        return self._cleared or len(self) > 0

    def extend(self, events: Iterable[KvEvent]) -> None:
        for event in events:
            if event.kind is KvEventKind.STORED:
                self._stored[event.block_hash] = None
            elif event.kind is KvEventKind.REMOVED:
                self._stored.pop(event.block_hash, None)
                self._removed[event.block_hash] = None
            else:
                self.restart(())

    def restart(self, resident: Iterable[bytes]) -> None:
        """Forget what was to be told; the reader is to forget all and know `resident`."""
        self._cleared = True
        self._removed = {}
        self._stored = dict.fromkeys(resident)

    def take(self) -> pb.KvEvents:
        message = pb.KvEvents(cleared=self._cleared, removed=b"".join(self._removed), stored=b"".join(self._stored))
        self._cleared, self._removed, self._stored = False, {}, {}
        return message
