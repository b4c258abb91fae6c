"""The block pool: 8 blocks, hashes of one letter."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.workers.toy_engine import EventReader
from workers.blocks import BlockPool
from workers.types import KvEvent, KvEventKind

STORED, REMOVED = KvEventKind.STORED, KvEventKind.REMOVED


def fill_all(pool: BlockPool, hashes: list[bytes]) -> list[int]:
    blocks = pool.allocate(len(hashes), "test")
    assert blocks is not None
    for block, block_hash in zip(blocks, hashes, strict=True):
        pool.fill(block, block_hash)
    return blocks


def test_a_block_goes_from_free_to_pending_to_ready_and_back() -> None:
    pool = BlockPool(8)
    assert pool.num_free == 8
    (block,) = pool.allocate(1, "me") or ()
    assert pool.is_pending(block)
    assert pool.num_free == 7
    pool.promise(block, b"a")
    assert pool.is_promised(b"a")
    assert (pool.filler_of(b"a"), pool.filler_of(b"b")) == ("me", None)
    assert pool.match([b"a"]) == []
    pool.fill(block, b"a")
    assert not pool.is_pending(block)
    assert not pool.is_promised(b"a")
    assert pool.match([b"a", b"b"]) == [block]
    pool.release([block])
    assert pool.num_free == 8
    assert pool.match([b"a"]) == [block], "a freed block keeps its content"
    pool.check_integrity([])
    assert pool.drain_events() == [KvEvent(STORED, b"a")]
    assert pool.drain_events() == []


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(8)
    assert pool.allocate(9, "me") is None
    assert pool.num_free == 8
    assert pool.allocate(0, "me") == []
    assert sorted(pool.allocate(8, "me") or ()) == list(range(8))
    assert pool.allocate(1, "me") is None


def test_the_tail_of_the_least_recently_freed_table_is_reused_first() -> None:
    pool = BlockPool(4)
    old = fill_all(pool, [b"a", b"b"])
    new = fill_all(pool, [b"c", b"d"])
    pool.release(reversed(old))
    pool.release(reversed(new))
    pool.drain_events()
    assert [pool.allocate(1, "me") for _ in range(4)] == [[old[1]], [old[0]], [new[1]], [new[0]]]
    assert [event.block_hash for event in pool.drain_events()] == [b"b", b"a", b"d", b"c"]
    pool.check_integrity()


def test_a_block_that_nobody_can_find_is_reused_before_cached_content() -> None:
    pool = BlockPool(2)
    (cached,) = fill_all(pool, [b"a"])
    (nameless,) = pool.allocate(1, "me") or ()
    pool.release([cached])
    pool.release([nameless])
    assert pool.allocate(1, "me") == [nameless]
    assert pool.match([b"a"]) == [cached]


def test_acquiring_a_freed_block_saves_it_from_reuse() -> None:
    pool = BlockPool(2)
    a, b = fill_all(pool, [b"a", b"b"])
    pool.release([b, a])
    pool.acquire([b])
    assert pool.allocate(1, "me") == [a]
    assert pool.allocate(1, "me") is None
    pool.check_integrity([[b], [a]])


def test_a_second_block_of_the_same_content_stays_nameless() -> None:
    pool = BlockPool(3)
    first, second = fill_all(pool, [b"a", b"a"])
    assert pool.match([b"a"]) == [first]
    assert pool.drain_events() == [KvEvent(STORED, b"a")]
    pool.release([second, first])
    pool.check_integrity([])
    assert pool.resident_hashes() == {b"a"}


def test_a_promise_is_given_once_and_ends_with_its_block() -> None:
    pool = BlockPool(4)
    one, two, three = pool.allocate(3, "me") or ()
    pool.promise(one, b"a")
    pool.promise(two, b"a")
    pool.release([one])
    assert not pool.is_promised(b"a"), "whoever promised it has gone"
    pool.promise(two, b"a")
    pool.fill(two, b"a")
    pool.promise(three, b"a")
    assert not pool.is_promised(b"a")
    pool.check_integrity([[two], [three]])


def test_a_promised_block_may_turn_out_without_a_name() -> None:
    pool = BlockPool(1)
    (block,) = pool.allocate(1, "me") or ()
    pool.promise(block, b"a")
    pool.fill(block)
    assert not pool.is_promised(b"a")
    assert pool.match([b"a"]) == []
    pool.check_integrity([[block]])


def test_writing_to_a_block_of_ones_own_needs_no_copy() -> None:
    pool = BlockPool(4)
    pending, ready = pool.allocate(2, "me") or ()
    pool.fill(ready)
    assert pool.write(pending, "me") == pending
    assert pool.write(ready, "me") == ready
    assert pool.is_pending(ready)


def test_writing_to_a_shared_or_findable_block_goes_to_a_copy() -> None:
    pool = BlockPool(4)
    (findable,) = fill_all(pool, [b"a"])
    copy = pool.write(findable, "me")
    assert copy not in (None, findable)
    assert pool.match([b"a"]) == [findable]
    pool.check_integrity([[findable], [copy]])
    (pending,) = pool.allocate(1, "me") or ()
    pool.acquire([pending])
    assert pool.write(pending, "me") not in (None, pending)
    assert pool.num_references(pending) == 2, "the caller releases it when the copy is made"


def test_without_a_free_block_a_shared_one_cannot_be_written_but_ones_own_is_forgotten() -> None:
    pool = BlockPool(1)
    (block,) = fill_all(pool, [b"a"])
    pool.acquire([block])
    assert pool.write(block, "me") is None
    pool.release([block])
    pool.drain_events()
    assert pool.write(block, "me") == block
    assert pool.drain_events() == [KvEvent(REMOVED, b"a")]
    pool.check_integrity([[block]])


def test_releasing_twice_is_our_bug() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1, "me") or []
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


@pytest.mark.parametrize(
    "damage",
    [
        lambda pool: pool._blocks[0].__setattr__("references", 2),
        lambda pool: pool._resident.clear(),
        lambda pool: pool._promised.update({b"x": 3}),
        lambda pool: pool._free.popitem(),
        lambda pool: pool._blocks[1].__setattr__("hash", b"a"),
        lambda pool: pool._free.move_to_end(3),
    ],
)
def test_the_integrity_check_sees_damage(damage) -> None:  # type: ignore[no-untyped-def]
    pool = BlockPool(4)
    a, b, c = fill_all(pool, [b"a", b"b", b"c"])
    pool.release([c])
    pool.check_integrity([[a, b]])
    damage(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity([[a, b]])


class PoolMachine(RuleBasedStateMachine):
    """Holders that do to a pool what sequences do; the model is what each of them holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6)
        self.tables: list[list[int]] = []
        self.reader = EventReader()

    @rule(count=st.integers(1, 4), promised=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), max_size=4))
    def allocate(self, count: int, promised: list[bytes]) -> None:
        num_free = self.pool.num_free
        blocks = self.pool.allocate(count, object())
        assert (blocks is None) == (count > num_free)
        if blocks is not None:
            self.tables.append(blocks)
            for block, block_hash in zip(blocks, promised, strict=False):
                self.pool.promise(block, block_hash)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), block_hash=st.sampled_from([b"a", b"b", b"c", b"d", None]))
    def fill(self, data: st.DataObject, block_hash: bytes | None) -> None:
        block = data.draw(st.sampled_from([b for table in self.tables for b in table]))
        if self.pool.is_pending(block):
            self.pool.fill(block, block_hash)
            assert not self.pool.is_pending(block)
            assert block_hash is None or len(self.pool.match([block_hash])) == 1

    @rule(hashes=st.lists(st.sampled_from([b"a", b"b", b"c", b"d"]), unique=True, min_size=1))
    def share(self, hashes: list[bytes]) -> None:
        blocks = self.pool.match(hashes)
        self.pool.acquire(blocks)
        if blocks:
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        old, num_free = table[-1], self.pool.num_free
        new = self.pool.write(old, object())
        if new is None:
            assert num_free == 0
            assert self.pool.num_references(old) > 1
            return
        assert self.pool.is_pending(new)
        assert self.pool.num_references(new) == 1
        if new != old:
            table[-1] = new
            self.pool.release([old])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.pool.release(reversed(table))

    @invariant()
    def holds_together(self) -> None:
        self.pool.check_integrity(self.tables)
        self.reader.apply(self.pool.drain_events())
        assert self.reader.resident == self.pool.resident_hashes()


PoolMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestPoolMachine = PoolMachine.TestCase
