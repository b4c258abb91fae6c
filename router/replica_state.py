"""What a router believes of one replica: its last report, plus what was sent since. Pure.

A lease, not a count: nothing here is decremented when a request ends. Each message of the replica says up to which
dispatch its load counts; what it counts is dropped here, so a cancelled or lost request cannot leak. A new attachment
starts from nothing.
"""

from __future__ import annotations

import sys
from collections import deque

from octavo.internal.v1 import data_plane_pb2 as pb

from router.wire import from_load
from workers.prefix import HASH_BYTES
from workers.types import Load


class ReplicaState:
    """Implements what `placement.Placeable` asks of a replica."""

    def __init__(self, replica: str) -> None:
        self.replica = replica
        self.block_size = 1
        self.num_blocks = 0
        self.load = Load()
        self.resident: set[bytes] = set()
        self._sent: deque[tuple[int, int, int]] = deque()
        """(batch id, prompt tokens, choices) of the works that the load does not count yet, in order."""
        self._sent_tokens = 0
        self._sent_choices = 0

    @property
    def owed_tokens(self) -> int:
        """Prompt tokens that are to be computed there."""
        return self.load.owed_prefill_tokens + self._sent_tokens

    @property
    def num_running(self) -> int:
        """Sequences: a request has one for each choice."""
        return self.load.num_running + self.load.num_waiting + self._sent_choices

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

    def start(self, ack: pb.HelloAck) -> None:
        """Begin anew with what the replica says of itself. Raises ValueError for what no replica of ours says."""
        if ack.block_size < 1:
            raise ValueError(f"block_size must be at least 1, is {ack.block_size}")
        self.forget()
        self.block_size = ack.block_size
        self.num_blocks = ack.num_blocks
        self.load = from_load(ack.load)
        self._apply(ack.resident)

    def sent(self, batch_id: int, num_tokens: int, *, num_choices: int = 1) -> None:
        """Count a work that goes out with `batch_id`, which never decreases."""
        self._sent.append((batch_id, num_tokens, num_choices))
        self._sent_tokens += num_tokens
        self._sent_choices += num_choices

    def update(self, batch: pb.StepBatch) -> bool:
        """Take a report in; return whether it may have brought credit. Raises ValueError for malformed hashes."""
        if batch.HasField("kv_events"):
            self._apply(batch.kv_events)
        if not batch.HasField("load"):
            return False
        self.load = from_load(batch.load, batch.step)
        while self._sent and self._sent[0][0] <= batch.last_batch_id:
            _, num_tokens, num_choices = self._sent.popleft()
            self._sent_tokens -= num_tokens
            self._sent_choices -= num_choices
        return True

    def forget(self) -> None:
        """The stream broke: nothing that was known or sent holds any more."""
        self.load = Load()
        self.resident = set()
        self._sent.clear()
        self._sent_tokens = self._sent_choices = 0

    def _apply(self, events: pb.KvEvents) -> None:
        if events.cleared:
            self.resident = set()
        self.resident.difference_update(_hashes(events.removed))
        self.resident.update(_hashes(events.stored))
        if len(self.resident) > self.num_blocks:
            raise ValueError(f"{len(self.resident)} blocks are resident, the replica has {self.num_blocks}")


def _hashes(joined: bytes) -> list[bytes]:
    if len(joined) % HASH_BYTES:
        raise ValueError(f"hashes have {HASH_BYTES} bytes each, got {len(joined)} in all")
    return [joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES)]
