"""Why a request waited: whether nobody was there, everybody was full, or it was not its turn."""

from __future__ import annotations

import random

import pytest

from router.wait_clock import WaitClock


def test_a_wait_is_told_apart_by_what_kept_it() -> None:
    clock = WaitClock(0.0)
    clock.see(10.0, has_replica=False, has_room=False)
    mark = clock.begin(11.0, num_waiting=3)
    clock.see(14.0, has_replica=True, has_room=False)
    clock.gone()
    clock.see(20.0, has_replica=True, has_room=True)
    clock.gone()
    wait = clock.wait(mark, 21.5)
    assert wait.since == 11.0
    assert wait.duration_s == 10.5
    assert wait.no_replica_s == 3.0
    assert wait.full_s == 6.0
    assert (wait.num_waiting, wait.num_gone) == (3, 2)


def test_what_lasts_still_counts() -> None:
    clock = WaitClock(0.0)
    clock.see(0.0, has_replica=True, has_room=False)
    mark = clock.begin(2.0, 0)
    assert clock.wait(mark, 5.0).full_s == 3.0
    assert clock.wait(mark, 6.0).full_s == 4.0
    clock.see(7.0, has_replica=False, has_room=False)
    wait = clock.wait(mark, 9.0)
    assert (wait.full_s, wait.no_replica_s) == (5.0, 2.0)


def test_the_parts_are_those_of_a_clock_that_counts_each_second() -> None:
    rng = random.Random(7)
    states = [(rng.random() < 0.7, rng.random() < 0.5) for _ in range(200)]
    clock = WaitClock(0.0)
    marks = {}
    for second, (has_replica, has_room) in enumerate(states):
        clock.see(second, has_replica=has_replica, has_room=has_room)
        marks[second] = clock.begin(second, 0)
        begun = rng.randrange(second + 1)
        wait = clock.wait(marks[begun], second)
        past = states[begun:second]
        assert wait.no_replica_s == pytest.approx(sum(not there for there, _ in past))
        assert wait.full_s == pytest.approx(sum(there and not room for there, room in past))
