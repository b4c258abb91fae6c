"""The index over all replicas, against sets that a child would keep."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.prefix_index import Matches, PrefixIndex, count_matched, slots_of
from workers.prefix import DIGEST_MASK, toggle


def block(number: int) -> bytes:
    """A new object each time, as the wire makes them."""
    return number.to_bytes(16, "little")


def blocks(*numbers: int) -> list[bytes]:
    return [block(number) for number in numbers]


class Naive:
    """One set for each replica, and a list of what is on its way."""

    def __init__(self) -> None:
        self.resident: dict[int, set[int]] = {}
        self.expected: list[tuple[int, tuple[int, ...]]] = []

    def match(self, prompt: list[int]) -> dict[int, tuple[int, int]]:
        """By slot that has any: (blocks that it has or computes, blocks that it has)."""
        found = {}
        for slot in range(4):
            has = self.resident.get(slot, set())
            coming = has.union(*(numbers for at, numbers in self.expected if at == slot))
            far = count_matched(blocks(*prompt), blocks(*coming))
            if far:
                found[slot] = (far, count_matched(blocks(*prompt), blocks(*has)))
        return found


def found_by(matches: Matches) -> dict[int, tuple[int, int]]:
    found = dict(matches.shared)
    for num_blocks, slots in matches.runs:
        for slot in slots_of(slots):
            assert slot not in found
            found[slot] = (num_blocks, num_blocks)
    assert all(far > has for far, has in matches.shared.values())
    return found


SLOT = st.integers(0, 3)
NUMBERS = st.lists(st.integers(0, 5), max_size=5, unique=True)
STEP = st.one_of(
    st.tuples(st.sampled_from(["store", "remove", "expect"]), SLOT, NUMBERS),
    st.tuples(st.sampled_from(["clear", "unexpect", "touch"]), SLOT, NUMBERS),
)


@given(st.lists(STEP, max_size=30), st.lists(NUMBERS, min_size=1, max_size=4))
def test_the_index_is_what_replicas_said(steps: list[tuple[str, int, list[int]]], prompts: list[list[int]]) -> None:
    index, naive = PrefixIndex(), Naive()
    for action, slot, numbers in steps:
        if action == "store":
            index.store(slot, blocks(*numbers))
            naive.resident.setdefault(slot, set()).update(numbers)
        elif action == "remove":
            index.remove(slot, blocks(*numbers))
            naive.resident.get(slot, set()).difference_update(numbers)
        elif action == "clear":
            index.clear(slot)
            naive.resident.pop(slot, None)
        elif action == "touch":
            index.touch(slot, blocks(*numbers))
        elif action == "expect":
            index.expect(slot, blocks(*numbers))
            naive.expected.append((slot, tuple(numbers)))
        elif naive.expected:
            at, was = naive.expected.pop(len(numbers) % len(naive.expected))
            index.unexpect(at, blocks(*was))
        index.check_integrity()
        for prompt in prompts:
            assert found_by(index.match(iter(blocks(*prompt)))) == naive.match(prompt)
    for slot in range(4):
        has = naive.resident.get(slot, set())
        assert index.resident(slot) == set(blocks(*has))
        digest = 0
        for number in has:
            digest = toggle(digest, block(number))
        assert index.told(slot) == (len(has), digest & DIGEST_MASK)


@given(
    st.lists(st.tuples(st.booleans(), SLOT, st.integers(0, 30)), max_size=80),
    st.integers(1, 12),
)
def test_beyond_its_bound_it_forgets_but_never_lies(steps: list[tuple[bool, int, int]], max_entries: int) -> None:
    index = PrefixIndex(max_entries)
    truth: dict[int, set[int]] = {slot: set() for slot in range(4)}
    for is_stored, slot, number in steps:
        if is_stored == (number in truth[slot]):
            continue  # replicas say what has changed
        if is_stored:
            index.store(slot, [block(number)])
            truth[slot].add(number)
        else:
            index.remove(slot, [block(number)])
            truth[slot].discard(number)
        index.check_integrity()
        for each, has in truth.items():
            assert index.resident(each) <= set(blocks(*has))
            digest = 0
            for one in has:
                digest = toggle(digest, block(one))
            assert index.told(each) == (len(has), digest & DIGEST_MASK), "what is forgotten still counts as told"


def test_the_oldest_of_the_replica_with_most_goes_first_and_of_a_prompt_its_tail() -> None:
    index = PrefixIndex(max_entries=12)
    index.store(0, blocks(1, 2, 3))
    index.store(1, blocks(11, 12, 13, 14))
    index.store(1, blocks(21, 22, 23, 24))
    index.touch(1, blocks(11, 12))
    index.store(0, blocks(4))
    index.store(2, blocks(5))
    assert index.resident(1) == set(blocks(11, 12, 13, 21, 22, 23, 24)), "14 is the tail of what is oldest"
    index.store(2, blocks(6))
    assert index.resident(1) == set(blocks(11, 12, 21, 22, 23, 24))
    index.store(2, blocks(7))
    assert index.resident(1) == set(blocks(11, 12, 21, 22, 23)), "11 and 12 were used later"
    assert index.resident(0) == set(blocks(1, 2, 3, 4))


def test_no_more_of_a_prompt_is_hashed_than_anybody_has_and_one() -> None:
    index = PrefixIndex()
    index.store(3, blocks(1, 2))
    asked = []

    def prompt() -> Iterator[bytes]:
        for number in (1, 2, 3, 4, 5):
            asked.append(number)
            yield block(number)

    assert index.match(prompt()).runs == [(2, 1 << 3)]
    assert asked == [1, 2, 3]


def test_a_replica_that_leaves_costs_what_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 replicas with 16 blocks each one leaves; what the others have is not looked at."""
    index = PrefixIndex()
    for slot in range(400):
        index.store(slot, blocks(*range(slot, slot + 16)))
    forgotten = []
    forget = index._forget

    def note(*entry: Any) -> None:
        forgotten.append(entry)
        forget(*entry)

    monkeypatch.setattr(index, "_forget", note)
    index.clear(200)
    assert len(forgotten) == 16
    index.check_integrity()


@pytest.mark.parametrize("num_slots", [1, 5, 70, 1_000])
def test_slots_of_a_set(num_slots: int) -> None:
    slots = sorted(random.Random(num_slots).sample(range(2_000), num_slots))
    assert list(slots_of(sum(1 << slot for slot in slots))) == slots


def test_only_a_run_from_the_beginning_matches() -> None:
    assert count_matched(blocks(1, 2, 3), set(blocks(1, 3))) == 1
    assert count_matched(blocks(1, 2), set(blocks(1, 2))) == 2
    assert count_matched([], set(blocks(1))) == 0
