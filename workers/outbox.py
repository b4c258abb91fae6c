"""What one router has not been told yet, merged into as few messages as it takes: pure, one per attached router.

Deltas of one work and choice become one delta, KV events their net effect, loads the last one; so what waits for a
slow router is bounded by its works and by the size of the block pool. `take` needs credit, and says everything at once.
Knows no gRPC stream, no clock and no engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from octavo.internal.v1 import data_plane_pb2 as pb

from workers.types import KvEvent, KvEventKind, Load, Resident, TokenDelta
from workers.wire import add_to, to_load


class Outbox:
    """`resident` returns the hashes of all resident blocks; it is asked when the events that wait outgrow the pool."""

    def __init__(self, *, max_kv_events: int, resident: Callable[[], Iterable[bytes]]) -> None:
        self._max_kv_events = max_kv_events
        self._resident = resident
        self._batch = pb.StepBatch()
        self._deltas: dict[tuple[int, int], pb.WorkDelta] = {}
        self._kv = PendingKv()
        self._load: Load | None = None
        self._of_engine: Resident | None = None
        self._last_batch_id = 0
        self._credit = 0
        self._draining: pb.Draining | None = None

    @property
    def has_deltas(self) -> bool:
        return bool(self._deltas)

    @property
    def is_empty(self) -> bool:
        return not self._deltas and self._load is None and self._draining is None and not self._kv

    @property
    def can_take(self) -> bool:
        return self._draining is not None or (self._credit > 0 and not self.is_empty)

    def grant(self, num_batches: int) -> None:
        self._credit += num_batches

    def add(self, delta: TokenDelta) -> None:
        key = (delta.work_id.number, delta.index)
        message = self._deltas.get(key)
        if message is None:
            message = self._deltas[key] = self._batch.deltas.add(work_id=key[0], index=key[1])
        add_to(message, delta)

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
        """Return everything that waits as one message and spend a credit, if `can_take`."""
        assert self.can_take
        response = pb.AttachResponse()
        if self._draining is not None:
            response.draining.CopyFrom(self._draining)
            self._draining = None
        if self._credit > 0:
            self._credit -= 1
            batch, self._batch, self._deltas = self._batch, pb.StepBatch(), {}
            if self._load is not None:
                batch.load.CopyFrom(to_load(self._load))
                batch.step = self._load.num_steps
                batch.last_batch_id = self._last_batch_id
                if self._of_engine is not None:
                    batch.resident.num_blocks, batch.resident.digest = self._of_engine
                self._load = None
            if self._kv:
                batch.kv_events.CopyFrom(self._kv.take())
            response.step_batch.CopyFrom(batch)
        return response


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
