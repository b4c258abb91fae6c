"""Gives sequences their blocks: finds what is cached, promises what will be computed, publishes what is full.

Owns the blocks that steps copy from, until those steps are over; the rest is the pool's and the sequences'. Decides
nothing: the scheduler says who gets blocks and who loses them.

    block_table   cached ......... promised .................. tail
                  |- num_computed -|- full with known tokens -|- grows as tokens are drawn -|
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import chain
from typing import NamedTuple

from workers.blocks import BlockPool
from workers.prefix import PrefixHasher
from workers.sequence import Sequence


class Found(NamedTuple):
    """Blocks that hold the keys and values of the first `num_tokens` tokens of a sequence."""

    blocks: list[int]
    num_tokens: int


class BlockTables:
    """Fills in the block tables of sequences from `pool`; without `prefix_cache` nothing is found or published.

    With `reserve` a sequence gets the blocks of its longest possible answer at once.
    """

    def __init__(self, pool: BlockPool, hasher: PrefixHasher, *, prefix_cache: bool, reserve: bool = False) -> None:
        self._pool = pool
        self._hasher = hasher
        self.block_size = hasher.block_size
        self._prefix_cache = prefix_cache
        self._reserve = reserve
        self._copies: list[tuple[int, int]] = []
        """For the step that is being planned."""
        self._copied: dict[int, list[int]] = {}
        """By step number: the blocks that a step in flight copies from."""
        self._claimed: dict[bytes, Sequence] = {}
        """Blocks that are neither there nor promised, and which waiting sequence will be the first to compute them."""

    def num_blocks(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens`."""
        return -(-num_tokens // self.block_size)

    def refusal(self, sequence: Sequence) -> str | None:
        """Return why there could never be enough blocks, in words for a client; None if they suffice for it alone."""
        needed = self.num_blocks(sequence.max_stored_tokens)
        if needed <= self._pool.num_blocks:
            return None
        return (
            f"prompt ({sequence.num_prompt_tokens} tokens) + max_tokens ({sequence.work.max_tokens}) needs {needed} KV "
            f"blocks of {self.block_size} tokens, the engine has {self._pool.num_blocks}"
        )

    def find(self, sequence: Sequence) -> Found | None:
        """Return what there is of a waiting sequence; None if somebody computes its next block or its prompt now.

        A choice that has not run yet gets the blocks of its leader's prompt, the one that is not full among them.
        """
        if _awaits_leader(sequence):
            return None
        num_tokens = len(sequence.tokens)
        leader = sequence.leader
        if leader is not None and sequence.started_at is None:
            shared = leader.block_table[: self.num_blocks(num_tokens)]
            if shared and leader.num_computed >= num_tokens:
                return Found(shared, num_tokens)
        hashes = self._hashes(sequence)
        matched = self._pool.match(hashes)
        if len(matched) < len(hashes) and self._pool.is_promised(hashes[len(matched)]):
            return None
        return Found(matched, len(matched) * self.block_size)

    def blocker(self, sequence: Sequence) -> Hashable | None:
        """Return who it is for whose work `find` gives None."""
        if _awaits_leader(sequence):
            return sequence.leader
        hashes = self._hashes(sequence)
        num_matched = len(self._pool.match(hashes))
        return self._pool.filler_of(hashes[num_matched]) if num_matched < len(hashes) else None

    def claim(self, sequence: Sequence) -> None:
        """`sequence` begins to wait: note what it is spared, because it is there or others will have computed it by
        then, and that it will compute the rest. `unclaim` it when it runs or ends."""
        hashes, pool = self._hashes(sequence), self._pool
        count = 0
        for block_hash in hashes:
            if not (block_hash in self._claimed or pool.is_promised(block_hash) or pool.is_resident(block_hash)):
                break
            count += 1
        sequence.num_spared = count * self.block_size
        for block_hash in hashes[count:]:
            self._claimed.setdefault(block_hash, sequence)

    def unclaim(self, sequence: Sequence) -> None:
        """Idempotent."""
        for block_hash in self._hashes(sequence)[sequence.num_spared // self.block_size :]:
            if self._claimed.get(block_hash) is sequence:
                del self._claimed[block_hash]

    def take(self, sequence: Sequence, found: Found, *, spare: int) -> int | None:
        """Give `sequence` the blocks of all its tokens (of all that it may come to, with `reserve`), those found first,
        if `spare` are left then; return how many of its tokens are computed, or None, and no effect, if there are too
        few blocks.

        If all of its tokens are computed, the last one is computed again for its logits, in a copy of the last block.
        """
        pool = self._pool
        matched, num_cached = found
        num_stored = sequence.max_stored_tokens if self._reserve else sequence.num_tokens
        num_fresh = self.num_blocks(num_stored) - len(matched)
        is_all_cached = num_cached == sequence.num_tokens
        needed = num_fresh + sum(pool.num_references(block) == 0 for block in matched)
        if is_all_cached and pool.num_references(matched[-1]):
            needed += 1
        if needed + spare > pool.num_free:
            return None
        pool.acquire(matched)
        if sequence.leader is not None:
            sequence.leader.quiet_until = 0  # others may now hold the block that it writes to
        fresh = pool.allocate(num_fresh, sequence)
        assert fresh is not None
        sequence.block_table = [*matched, *fresh]
        if is_all_cached:
            num_cached -= 1
            has_block = self._own(sequence, num_cached)
            assert has_block
        for i, block_hash in enumerate(self._hashes(sequence)):
            if i >= num_cached // self.block_size:
                pool.promise(sequence.block_table[i], block_hash)
        return num_cached

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Let `sequence` write its next `num_tokens`; return False if there is no block for that. Then make room, and
        call it again."""
        table, start = sequence.block_table, sequence.num_scheduled
        missing = -(-(start + num_tokens) // self.block_size) - len(table)
        if missing > 0:
            fresh = self._pool.allocate(missing, sequence)
            if fresh is None:
                return False
            table += fresh
        return self._own(sequence, start)

    def has_room_for(self, num_sequences: int) -> bool:
        """Whether so many can `extend` by a token each, whoever they are: a block is the most that takes."""
        return self._pool.num_free >= num_sequences

    def extend_for_draft(self, sequence: Sequence, num_tokens: int, *, spare: int) -> int:
        """Let `sequence` write up to `num_tokens` behind those scheduled, in blocks that it has and in free ones, of
        which `spare` are left; return how many. `shrink` follows when they have been verified."""
        table = sequence.block_table
        missing = self.num_blocks(sequence.num_scheduled + num_tokens) - len(table)
        table += self._pool.allocate(max(0, min(missing, self._pool.num_free - spare)), sequence) or ()
        return min(num_tokens, len(table) * self.block_size - sequence.num_scheduled)

    def shrink(self, sequence: Sequence) -> None:
        """Give back the blocks of guesses that were wrong."""
        table = sequence.block_table
        keep = self.num_blocks(sequence.max_stored_tokens if self._reserve else sequence.num_tokens)
        self._pool.release(reversed(table[keep:]))
        del table[keep:]

    def publish(self, sequence: Sequence, start: int) -> None:
        """Make ready the blocks that became full since `num_computed` was `start`."""
        first, last = start // self.block_size, sequence.num_computed // self.block_size
        if first < last:
            hashes = self._hashes(sequence)
            for i in range(first, last):
                self._pool.fill(sequence.block_table[i], hashes[i] if hashes else None)

    def release(self, sequence: Sequence) -> None:
        """Give all blocks of `sequence` back, the tail to be reused first."""
        self._pool.release(reversed(sequence.block_table))
        sequence.block_table = []

    def begin_copies(self, step: int) -> tuple[tuple[int, int], ...]:
        """Return the copies (from, to) that `step` makes; what it copies from is held until `end_copies`."""
        copies, self._copies = tuple(self._copies), []
        if copies:
            self._copied[step] = [source for source, _ in copies]
        return copies

    def end_copies(self, step: int) -> None:
        """Let go of the blocks that `step` copied from. Idempotent."""
        self._pool.release(self._copied.pop(step, ()))

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Assert what must hold between steps; `holders` are all sequences with blocks."""
        assert not self._copies
        assert not any(claimer.is_ended or claimer.block_table for claimer in self._claimed.values())
        holders = list(holders)
        for sequence in holders:
            assert len(sequence.block_table) >= self.num_blocks(sequence.num_scheduled)
        self._pool.check_integrity(chain((s.block_table for s in holders), self._copied.values()))

    def _own(self, sequence: Sequence, position: int) -> bool:
        """See that nobody else sees the block that `position` is written to; return whether that could be done."""
        table, i = sequence.block_table, position // self.block_size
        block = self._pool.write(table[i], sequence)
        if block is None:
            return False
        if block != table[i]:
            self._copies.append((table[i], block))
            table[i] = block
        return True

    def _hashes(self, sequence: Sequence) -> list[bytes]:
        return sequence.block_hashes(self._hasher) if self._prefix_cache else []


def _awaits_leader(sequence: Sequence) -> bool:
    """Whether the prompt of this choice, which has not run yet, is still to be computed by another one."""
    leader = sequence.leader
    if leader is None or leader.is_ended or leader.first_token_at is not None:
        return False
    return sequence.started_at is None
