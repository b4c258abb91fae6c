"""What a router believes of one replica: its last report, plus what was sent since. Pure.

A lease, not a count: nothing here is decremented when a request ends. Each message of the replica says up to which
dispatch its load counts; what it counts is dropped here, so a cancelled or lost request cannot leak. Blocks of a prompt
that was sent are expected until the replica says something of its work, or the router wants no more of it. A new
attachment starts from nothing.

A report may also say how many blocks the engine has and their digest. What the replica's events add up to must be the
same; if not, events were lost or the cache was changed behind everybody's back: all is forgotten and asked for anew.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from typing import Final

from octavo.internal.v1 import data_plane_pb2 as pb

from router.prefix_index import count_matched
from router.roster import Roster
from router.wire import from_load
from workers.prefix import HASH_BYTES
from workers.types import Load, Resident

PATIENCE: Final = 8
"""So many reports are taken unchecked until all blocks, which were asked for, must have come."""
MAX_DOUBLINGS: Final = 8
"""Of the number of reports that are taken unchecked, each time that a full set turns out wrong again."""


class ReplicaState:
    """Implements what `roster.Placeable` asks of a replica, and keeps `roster` told of it while it is attached."""

    def __init__(self, replica: str, roster: Roster | None = None) -> None:
        self.replica = replica
        self.block_size = 1
        self.num_blocks = 0
        self.capabilities: frozenset[str] = frozenset()
        self.load = Load()
        self.is_open = False
        self.needs_resync = False
        """Whether the replica is to be asked for all its blocks; whoever asks calls `resync_asked`."""
        self.num_resyncs = 0
        """How often what it had told was found wrong, in all attachments."""
        self._roster = roster or Roster()
        self._slot: int | None = None
        self._num_unchecked = 0
        """Reports that are still to be taken unchecked."""
        self._num_unsound = 0
        """How often all blocks were asked for since a report was last found right."""
        self._sent: deque[tuple[int, int, int]] = deque()
        """(batch id, uncached tokens, choices) of the works that the load does not count yet, in order."""
        self._sent_tokens = 0
        self._sent_choices = 0
        self._expected: dict[int, Sequence[bytes]] = {}
        """By work of which nothing was heard: its blocks that the replica did not have."""

    @property
    def owed_tokens(self) -> int:
        """Prompt tokens that are to be computed there."""
        return self.load.owed_prefill_tokens + self._sent_tokens

    @property
    def num_running(self) -> int:
        """Sequences: a request has one for each choice."""
        return self.load.num_running + self.load.num_waiting + self._sent_choices

    @property
    def cache_use(self) -> float:
        """Which part of its blocks can be found under a hash, 0 to 1."""
        if self._slot is None or not self.num_blocks:
            return 0.0
        return self._roster.index.num_told(self._slot) / self.num_blocks

    @property
    def credit_tokens(self) -> int:
        """Prompt tokens that it can still take; not above zero: none, of tokens or of sequences."""
        return self.load.credit_tokens - self._sent_tokens if self.credit_sequences > 0 else 0

    @property
    def credit_sequences(self) -> int:
        """Choices that it can still take on; not above zero: none."""
        places = self.load.credit_sequences
        return sys.maxsize if places is None else places - self._sent_choices

    @property
    def num_uncounted(self) -> int:
        """Choices that were sent and that no report counts yet."""
        return self._sent_choices

    @property
    def num_expected(self) -> int:
        """Works of which blocks are expected."""
        return len(self._expected)

    @property
    def resident(self) -> frozenset[bytes]:
        """Hashes of the blocks in its cache, as far as the router remembers them."""
        return frozenset() if self._slot is None else frozenset(self._roster.index.resident(self._slot))

    def start(self, ack: pb.HelloAck) -> None:
        """Begin anew with what the replica says of itself. Raises ValueError for what no replica of ours says."""
        if ack.block_size < 1:
            raise ValueError(f"block_size must be at least 1, is {ack.block_size}")
        self.forget()
        self.block_size = ack.block_size
        self.num_blocks = ack.num_blocks
        self.capabilities = frozenset(ack.capabilities)
        self.load = from_load(ack.load)
        self.is_open = True
        self._slot = self._roster.join(self)
        self._apply(ack.resident)
        self._changed()

    def close(self) -> None:
        """Send nothing new: the replica drains or has left the set."""
        self.is_open = False
        self._changed()

    def sent(self, batch_id: int, num_tokens: int, *, num_choices: int = 1) -> None:
        """Count a work of which `num_tokens` are to be computed and that goes out with `batch_id`, which never
        decreases."""
        self._sent.append((batch_id, num_tokens, num_choices))
        self._sent_tokens += num_tokens
        self._sent_choices += num_choices
        self._changed()

    def expect(self, work_id: int, hashes: Sequence[bytes]) -> None:
        """The prompt of `work_id`, which has just been sent, has these blocks."""
        assert self._slot is not None
        index = self._roster.index
        num_resident = count_matched(hashes, index.resident(self._slot))
        index.touch(self._slot, hashes[:num_resident])
        if coming := hashes[num_resident:]:
            self._expected[work_id] = coming
            index.expect(self._slot, coming)

    def unexpect(self, work_id: int) -> None:
        """The work has left, or has got somewhere: what it has computed the events say."""
        coming = self._expected.pop(work_id, None)
        if coming is not None:
            assert self._slot is not None
            self._roster.index.unexpect(self._slot, coming)

    def update(self, batch: pb.StepBatch) -> bool:
        """Take a report in; return whether it may have brought credit. Raises ValueError for malformed hashes."""
        if batch.HasField("kv_events"):
            self._apply(batch.kv_events)
        if self._expected:
            for delta in batch.deltas:
                self.unexpect(delta.work_id)
        if not batch.HasField("load"):
            if batch.HasField("kv_events"):
                self._changed()
            return False
        before, self.load = self.load.num_computed_tokens, from_load(batch.load, batch.step)
        if self._slot is not None and self.load.num_computed_tokens > before:
            self._roster.recent.add(self._slot, self.load.num_computed_tokens - before)
        while self._sent and self._sent[0][0] <= batch.last_batch_id:
            _, num_tokens, num_choices = self._sent.popleft()
            self._sent_tokens -= num_tokens
            self._sent_choices -= num_choices
        if batch.HasField("resident"):
            self._check(Resident(batch.resident.num_blocks, batch.resident.digest))
        self._changed()
        return True

    def resync_asked(self) -> None:
        self.needs_resync = False

    def forget(self) -> None:
        """The stream broke: nothing that was known or sent holds any more."""
        self.load = Load()
        self.is_open = self.needs_resync = False
        self._num_unchecked = self._num_unsound = 0
        self._sent.clear()
        self._sent_tokens = self._sent_choices = 0
        self._expect_nothing()
        if self._slot is not None:
            self._roster.leave(self._slot)
            self._slot = None

    def _apply(self, events: pb.KvEvents) -> None:
        assert self._slot is not None
        index, slot = self._roster.index, self._slot
        if events.cleared:
            index.clear(slot)
            self._expect_nothing()
            if self._num_unsound:
                # Here they are. One that is wrong again and again is checked, and asked, ever less often.
                self._num_unchecked = (1 << self._num_unsound - 1) - 1
        index.remove(slot, _hashes(events.removed))
        index.store(slot, _hashes(events.stored))
        num_blocks = index.num_told(slot)
        if num_blocks > self.num_blocks:
            raise ValueError(f"{num_blocks} blocks are resident, the replica has {self.num_blocks}")

    def _check(self, engine: Resident) -> None:
        """Compare what the engine has with what was told. The report says so only if nothing is on the way."""
        assert self._slot is not None
        if self._num_unchecked:
            self._num_unchecked -= 1
            return
        if self._roster.index.told(self._slot) == engine:
            self._num_unsound = 0
            return
        self._roster.index.clear(self._slot)
        self.needs_resync = True
        self.num_resyncs += 1
        self._num_unchecked = PATIENCE << self._num_unsound
        self._num_unsound = min(self._num_unsound + 1, MAX_DOUBLINGS)

    def _expect_nothing(self) -> None:
        for work_id in list(self._expected):
            self.unexpect(work_id)

    def _changed(self) -> None:
        if self._slot is not None:
            self._roster.changed(self._slot)


def _hashes(joined: bytes) -> list[bytes]:
    if len(joined) % HASH_BYTES:
        raise ValueError(f"hashes have {HASH_BYTES} bytes each, got {len(joined)} in all")
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]
