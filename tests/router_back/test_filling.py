"""How fast free places are taken by a tenant that has more than its part."""

from __future__ import annotations

import pytest

from router.filling import FILL_SHARE, MAX_REMEMBERED, Filling


def make_filling(**taken: int) -> Filling:
    filling = Filling()
    filling.answered(1.0)
    for _ in range(10):
        for tenant, count in taken.items():
            for _ in range(count):
                filling.taken(tenant, 1)
                filling.left(tenant, 1)
    return filling


def test_who_has_too_much() -> None:
    assert not make_filling(a=10).has_too_much("a", 10), "alone it may have all"
    two = make_filling(a=10, b=10)
    assert not two.has_too_much("a", 10)
    assert not two.has_too_much("b", 10)
    greedy = make_filling(a=2, b=2, c=2, greedy=10)
    assert [name for name in ("a", "b", "c", "greedy", "new") if greedy.has_too_much(name, 10)] == ["greedy"]


def test_what_was_taken_long_ago_does_not_count() -> None:
    filling = make_filling(a=1, greedy=20)
    for _ in range(2_000):
        filling.taken("a", 1)
    assert not filling.has_too_much("greedy", 10)


def test_free_places_are_taken_over_a_part_of_an_answers_time() -> None:
    filling = make_filling(a=1, greedy=9)
    now = 10.0
    filling.may_go("greedy", now, 10, is_held=True)
    taken = 0
    while now < 10.0 + FILL_SHARE and taken < 10:
        while filling.may_go("greedy", now, 10 - taken, is_held=True):
            filling.taken("greedy", 1)
            taken += 1
        assert filling.due is not None
        assert filling.due > now
        now = min(filling.due, now + FILL_SHARE)
    assert 4 <= taken <= 8, "an exponential: some are left for others all the time"


def test_without_an_answer_everybody_may() -> None:
    filling = Filling()
    filling.taken("a", 1)
    filling.taken("b", 9)
    assert filling.may_go("b", 0.0, 1, is_held=True)


def test_who_has_more_than_its_part_now_has_too_much_whatever_it_took_before() -> None:
    filling = make_filling(a=10, b=10)
    for _ in range(17):
        filling.taken("new", 1)
    for tenant in "abcd":
        filling.taken(tenant, 1)
    assert filling.has_too_much("new", 64 - 21)
    assert not filling.has_too_much("a", 64 - 21)
    filling.left("new", 1)
    assert not filling.has_too_much("new", 64 - 20), "an equal part is 12.8 places, 16.6 are too much"


def test_while_plenty_is_free_nobody_waits() -> None:
    filling = make_filling(a=1, greedy=20)
    assert filling.may_go("greedy", 0.0, 10, is_held=False)
    assert not filling.may_go("greedy", 0.0, 10, is_held=True)
    for _ in range(60):
        filling.taken("greedy", 1)
    assert not filling.may_go("greedy", 0.0, 10, is_held=False)


def test_a_few_places_stay_free_for_newcomers() -> None:
    filling = make_filling(a=1, greedy=20)
    for _ in range(57):
        filling.taken("greedy", 1)
    now = 10.0
    for _ in range(100):
        assert not filling.may_go("greedy", now, 3, is_held=True)
        assert filling.due is not None
        assert now < filling.due < now + FILL_SHARE
        now = filling.due
    assert filling.may_go("a", now, 1, is_held=True)


@pytest.mark.parametrize("num_tenants", [MAX_REMEMBERED * 3])
def test_the_number_of_tenants_remembered_has_a_bound(num_tenants: int) -> None:
    filling = Filling()
    for i in range(num_tenants):
        filling.taken(str(i), 1)
        filling.left(str(i), 1)
    assert not filling._held
    assert len(filling._taken) <= MAX_REMEMBERED
    assert filling._total == pytest.approx(sum(filling._taken.values()))
