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
    return filling


def test_who_has_too_much() -> None:
    assert not make_filling(a=10).has_too_much("a"), "alone it may have all"
    two = make_filling(a=10, b=10)
    assert not two.has_too_much("a")
    assert not two.has_too_much("b")
    greedy = make_filling(a=2, b=2, c=2, greedy=10)
    assert [name for name in ("a", "b", "c", "greedy", "new") if greedy.has_too_much(name)] == ["greedy"]


def test_what_was_taken_long_ago_does_not_count() -> None:
    filling = make_filling(a=1, greedy=20)
    for _ in range(2_000):
        filling.taken("a", 1)
    assert not filling.has_too_much("greedy")


def test_free_places_are_taken_over_a_part_of_an_answers_time() -> None:
    filling = make_filling(a=1, greedy=9)
    now = 10.0
    filling.may_take(now, 10)
    taken = 0
    while now < 10.0 + FILL_SHARE and taken < 10:
        while filling.may_take(now, 10 - taken):
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
    assert filling.may_take(0.0, 1)


@pytest.mark.parametrize("num_tenants", [MAX_REMEMBERED * 3])
def test_the_number_of_tenants_remembered_has_a_bound(num_tenants: int) -> None:
    filling = Filling()
    for i in range(num_tenants):
        filling.taken(str(i), 1)
    assert len(filling._taken) <= MAX_REMEMBERED
    assert filling._total == pytest.approx(sum(filling._taken.values()))
