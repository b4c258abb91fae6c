"""Block tables alone: 8 blocks of 4 tokens, sequences moved by hand."""

from __future__ import annotations

import pytest

from tests.workers.toy_engine import work
from workers.blocks import BlockPool
from workers.prefix import PrefixHasher
from workers.sequence import Sequence
from workers.tables import BlockTables, Found


class Desk:
    """A pool, its tables and the sequences that hold blocks."""

    def __init__(self, num_blocks: int = 8, *, prefix_cache: bool = True, reserve: bool = False) -> None:
        self.pool = BlockPool(num_blocks)
        hasher = PrefixHasher(b"test", 4)
        self.tables = BlockTables(self.pool, hasher, prefix_cache=prefix_cache, reserve=reserve)
        self.num_steps = 0

    def start(self, sequence: Sequence, spare: int = 0) -> int | None:
        """Give `sequence` what there is of it, and the blocks of the rest."""
        found = self.tables.find(sequence)
        assert found is not None
        num_cached = self.tables.take(sequence, found, spare=spare)
        if num_cached is not None:
            sequence.start(num_cached)
            sequence.started_at = 0.0
        return num_cached

    def compute(self, sequence: Sequence, num_tokens: int) -> tuple[tuple[int, int], ...]:
        """Compute `num_tokens` in a step; return its copies."""
        self.num_steps += 1
        copies = self.tables.begin_copies(self.num_steps)
        start = sequence.num_computed
        samples = sequence.schedule(num_tokens)
        sequence.commit(num_tokens, samples=samples)
        self.tables.end_copies(self.num_steps)
        self.tables.publish(sequence, start)
        return copies


def sequence(number: int, num_tokens: int, max_tokens: int = 4, leader: Sequence | None = None) -> Sequence:
    return Sequence(work(number, range(num_tokens), max_tokens), arrival=number, leader=leader)


def test_what_is_found_is_what_was_published() -> None:
    desk = Desk()
    one, two = sequence(1, 10), sequence(2, 10)
    assert desk.start(one) == 0
    assert desk.tables.find(two) is None
    assert desk.tables.blocker(two) is one
    desk.compute(one, 6)
    assert desk.tables.find(two) is None, "the second block is being computed"
    desk.compute(one, 4)
    assert desk.tables.find(two) == Found(one.block_table[:2], 8)
    assert desk.tables.blocker(two) is None
    assert desk.start(two) == 8
    desk.tables.check_integrity([one, two])
    desk.tables.release(one)
    desk.tables.release(two)
    assert desk.pool.num_free == 8


def test_nothing_is_taken_if_it_is_not_all_there() -> None:
    desk = Desk()
    assert desk.start(sequence(1, 10), spare=6) is None
    assert desk.pool.num_free == 8
    one = sequence(1, 10)
    assert desk.start(one, spare=5) == 0
    assert len(one.block_table) == 3


def test_with_reserve_the_longest_answer_is_provided_for_and_never_given_back_early() -> None:
    desk = Desk(reserve=True)
    one = sequence(1, 3, max_tokens=10)
    desk.start(one)
    assert len(one.block_table) == 3
    desk.compute(one, 3)
    assert desk.tables.extend_for_draft(one, 9, spare=8) == 9
    desk.tables.shrink(one)
    assert len(one.block_table) == 3


def test_a_wholly_cached_sequence_writes_to_a_copy_of_its_last_block() -> None:
    desk = Desk()
    one, two = sequence(1, 8), sequence(2, 8)
    desk.start(one)
    desk.compute(one, 8)
    assert desk.start(two) == 7
    assert two.block_table[0] == one.block_table[0]
    assert desk.compute(two, 1) == ((one.block_table[1], two.block_table[1]),)
    desk.tables.check_integrity([one, two])


@pytest.mark.parametrize("num_tokens", [3, 4, 6])
def test_a_choice_waits_for_its_leader_and_takes_what_it_has(num_tokens: int) -> None:
    desk = Desk(prefix_cache=False)
    leader = sequence(1, num_tokens)
    choice = sequence(2, num_tokens, leader=leader)
    assert desk.tables.find(choice) is None
    assert desk.tables.blocker(choice) is leader
    desk.start(leader)
    desk.compute(leader, num_tokens)
    leader.append(9)
    leader.first_token_at = 1.0
    assert desk.start(choice) == num_tokens - 1
    assert desk.compute(choice, 1) == ((leader.block_table[-1], choice.block_table[-1]),)
    assert choice.block_table[:-1] == leader.block_table[:-1]
    desk.tables.check_integrity([leader, choice])


def test_a_choice_whose_leader_has_no_blocks_any_more_looks_for_itself() -> None:
    desk = Desk()
    leader = sequence(1, 6)
    choice = sequence(2, 6, leader=leader)
    desk.start(leader)
    desk.compute(leader, 6)
    leader.first_token_at = 1.0
    desk.tables.release(leader)
    leader.is_ended = True
    assert desk.tables.find(choice) == Found(desk.pool.match(choice.block_hashes(PrefixHasher(b"test", 4))), 4)
    assert desk.tables.blocker(choice) is None


def test_guesses_take_no_block_that_others_may_need_and_give_theirs_back() -> None:
    desk = Desk()
    one = sequence(1, 3, max_tokens=20)
    desk.start(one)
    one.schedule(3)
    assert desk.tables.extend_for_draft(one, 1, spare=8) == 1, "its own block has room"
    assert desk.tables.extend_for_draft(one, 9, spare=8) == 1
    assert desk.tables.extend_for_draft(one, 9, spare=6) == 5
    assert desk.tables.extend_for_draft(one, 9, spare=0) == 9
    assert (len(one.block_table), desk.pool.num_free) == (3, 5)
    desk.tables.shrink(one)
    assert (len(one.block_table), desk.pool.num_free) == (1, 7)


def test_what_can_never_fit_is_said_with_its_numbers() -> None:
    desk = Desk(4)
    assert desk.tables.refusal(sequence(1, 8, max_tokens=9)) is None
    assert desk.tables.refusal(sequence(1, 8, max_tokens=10)) == (
        "prompt (8 tokens) + max_tokens (10) needs 5 KV blocks of 4 tokens, the engine has 4"
    )


def test_a_table_grows_by_the_block_that_the_next_token_needs() -> None:
    desk = Desk()
    one = sequence(1, 3)
    desk.start(one)
    desk.compute(one, 3)
    for position in range(3, 6):
        one.append(9)
        assert desk.tables.extend(one, 1)
        assert len(one.block_table) == position // 4 + 1
        assert desk.compute(one, 1) == ()
    assert desk.tables.find(sequence(2, 3)) == Found([], 0)


def test_what_others_see_is_not_written_again_without_a_block_for_the_copy() -> None:
    desk = Desk(2)
    one = sequence(1, 8)
    desk.start(one)
    desk.compute(one, 8)
    desk.pool.acquire(one.block_table)
    one.roll_back()
    assert not desk.tables.extend(one, 1)
    desk.pool.release(one.block_table)
    assert desk.tables.extend(one, 1), "alone with it, it takes the name away"
    assert desk.compute(one, 1) == ()


def test_without_a_block_nothing_is_extended() -> None:
    desk = Desk(1)
    one = sequence(1, 4)
    desk.start(one)
    desk.compute(one, 4)
    one.append(9)
    assert not desk.tables.extend(one, 1)
    desk.tables.check_integrity([one])


def test_the_integrity_check_sees_a_table_that_is_too_short() -> None:
    desk = Desk()
    one = sequence(1, 9)
    desk.start(one)
    desk.compute(one, 9)
    desk.pool.release([one.block_table.pop()])
    with pytest.raises(AssertionError):
        desk.tables.check_integrity([one])
