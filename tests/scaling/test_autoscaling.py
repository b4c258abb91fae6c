"""The rule by which the number of replicas changes: bounds, delays, steps, silence, schedules."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscaling import Decision, Demand, ScalerState, ScalingConfig, ScheduledMinimum, desired_replicas

NOON = datetime(2026, 11, 23, 12, tzinfo=UTC).timestamp()
"""Of a Monday."""


def config(**fields: Any) -> ScalingConfig:
    given = {"max_replicas": 10, "target_sequences": 10.0, "upscale_delay_s": 1.0, "downscale_delay_s": 10.0, **fields}
    made = ScalingConfig(**given)
    made.check()
    return made.of_replicas(1, 64)


def demand(sequences: float, *, is_idle: bool = False, at_most: float | None = None) -> Demand:
    return Demand(sequences=sequences, is_idle=is_idle, at_most=at_most)


class Scaler:
    """Asks once a second, or whenever told."""

    def __init__(self, scaling: ScalingConfig, target: int = 1, now: float = NOON) -> None:
        self.scaling = scaling
        self.now = now
        self.last = Decision(target, "", ScalerState(target=target))

    def see(self, asked: Demand | None, seconds: float = 1.0) -> int:
        self.now += seconds
        self.last = desired_replicas(asked, self.scaling, self.last.state, self.now)
        assert self.last.target == self.last.state.target
        return self.last.target

    def see_all(self, *sequences: float) -> list[int]:
        return [self.see(demand(each)) for each in sequences]


def test_more_is_added_once_it_was_needed_for_the_delay() -> None:
    scaler = Scaler(config())
    assert scaler.see_all(10, 10, 35, 35) == [1, 1, 1, 4]
    assert scaler.last.reason == "35.0 sequences, 10 a replica"
    assert scaler.see_all(50, 70, 70) == [4, 5, 7]  # the least of what was asked for in the meantime
    assert scaler.see_all(200, 200) == [7, 10]


def test_a_moment_adds_nothing() -> None:
    scaler = Scaler(config(upscale_delay_s=2.0))
    assert scaler.see_all(90, 90, 5, 90, 90, 5) == [1] * 6


def test_without_a_delay_it_is_added_at_once() -> None:
    assert Scaler(config(upscale_delay_s=0.0)).see_all(25) == [3]


def test_a_tenth_too_much_adds_nothing() -> None:
    scaler = Scaler(config(), target=2)
    assert scaler.see_all(*[22.0] * 20) == [2] * 20
    assert scaler.see_all(22.1, 22.1) == [2, 3]


def test_fewer_are_taken_away_one_by_one_once_the_most_of_the_delay_allows_it() -> None:
    scaler = Scaler(config(), target=5)
    assert scaler.see_all(45, *[12] * 9) == [5] * 10
    assert scaler.see(demand(12)) == 4  # 45 is out of sight
    assert scaler.last.reason == "12.0 sequences were the most in 10 s"
    assert scaler.see_all(12, 12, 12) == [3, 2, 2]


def test_what_comes_back_in_time_keeps_all() -> None:
    scaler = Scaler(config(), target=5)
    for _ in range(10):
        assert scaler.see_all(45, 5, 5, 5, 5, 5, 5, 5) == [5] * 8


def test_nothing_is_taken_away_that_would_have_to_be_added_again() -> None:
    """Two replicas have 20 places; 18 of them leave the room that a demand of 18 needs, 18.1 does not."""
    assert Scaler(config(), target=3).see_all(*[18.1] * 30)[-1] == 3
    assert Scaler(config(), target=3).see_all(*[18.0] * 30)[-1] == 2


def test_a_backlog_that_needs_nobody_more_keeps_who_is_there() -> None:
    scaler = Scaler(config(), target=3)
    for _ in range(30):
        assert scaler.see(demand(10, at_most=40)) == 3
    assert scaler.see_all(*[5] * 20)[-1] == 1


def test_steps_are_limited() -> None:
    scaler = Scaler(config(max_step_up=2, upscale_delay_s=0.0))
    assert [scaler.see(demand(90), 0.5) for _ in range(8)] == [3, 3, 5, 5, 7, 7, 9, 9]
    scaler = Scaler(config(max_step_down=3), target=10)
    assert scaler.see_all(*[1] * 15)[-5:] == [7, 4, 1, 1, 1]
    assert Scaler(config(max_step_down=0), target=10).see_all(*[1] * 11)[-1] == 1


def test_the_last_replica_goes_when_nothing_came_for_long_enough() -> None:
    scaler = Scaler(config(min_replicas=0, zero_delay_s=5.0))
    assert scaler.see_all(1, 0, 0, 0) == [1] * 4  # something came
    idle = demand(0, is_idle=True)
    assert [scaler.see(idle) for _ in range(6)] == [1, 1, 1, 1, 1, 0]
    assert scaler.last.reason == "no request in 5 s"
    assert [scaler.see(idle) for _ in range(20)] == [0] * 20


def test_who_comes_to_none_waits_for_no_second_look() -> None:
    scaler = Scaler(config(min_replicas=0), target=0)
    assert scaler.see(demand(0.2)) == 1
    assert Scaler(config(min_replicas=0), target=0).see(demand(0)) == 1  # it was turned away, and will be back
    assert Scaler(config(min_replicas=0), target=0).see(demand(31)) == 3


def test_several_do_not_go_at_once_to_none() -> None:
    scaler = Scaler(config(min_replicas=0, zero_delay_s=0.0, max_step_down=0), target=5)
    idle = demand(0, is_idle=True)
    assert [scaler.see(idle) for _ in range(12)] == [5] * 10 + [1, 0]


def test_an_unknown_demand_holds_the_number_but_within_bounds() -> None:
    scaler = Scaler(config(schedule=("mon 12:01-13:00 4",)), target=2)
    assert [scaler.see(None) for _ in range(59)] == [2] * 59
    assert scaler.last.reason == "held: no router has said anything lately"
    assert scaler.see(None) == 4
    assert scaler.last.reason == "the minimum is 4"
    assert Scaler(config(max_replicas=3), target=7).see(None) == 3


def test_what_was_before_a_silence_proves_nothing() -> None:
    scaler = Scaler(config(min_replicas=0, zero_delay_s=10.0), target=3)
    idle = demand(0, is_idle=True)
    assert [scaler.see(idle) for _ in range(9)] == [3] * 9
    scaler.see(None)
    assert [scaler.see(idle) for _ in range(10)] == [3] * 10
    assert [scaler.see(idle) for _ in range(3)] == [2, 1, 0]
    scaler = Scaler(config(upscale_delay_s=2.0))
    assert [scaler.see(each) for each in (demand(30), demand(30), None, demand(30), demand(30))] == [1] * 5


def test_an_operators_number_is_exact() -> None:
    assert Scaler(config().fixed(7), target=3).see(demand(500)) == 7
    assert Scaler(config().fixed(0), target=3).see(demand(500)) == 0
    assert Scaler(config().fixed(2), target=3).last.reason == ""


@pytest.mark.parametrize(
    ("entry", "at", "holds"),
    [
        ("mon 08:00-18:00 3", "2026-11-23 07:59:59", False),
        ("mon 08:00-18:00 3", "2026-11-23 08:00:00", True),
        ("mon 08:00-18:00 3", "2026-11-23 17:59:59", True),
        ("mon 08:00-18:00 3", "2026-11-23 18:00:00", False),
        ("mon 08:00-18:00 3", "2026-11-24 12:00:00", False),
        ("sat-mon 08:00-24:00 3", "2026-11-22 23:59:59", True),
        ("sat-mon 08:00-24:00 3", "2026-11-24 09:00:00", False),
        ("fri 22:00-06:00 3", "2026-11-27 23:00:00", True),
        ("fri 22:00-06:00 3", "2026-11-28 05:59:59", True),
        ("fri 22:00-06:00 3", "2026-11-28 06:00:00", False),
        ("fri 22:00-06:00 3", "2026-11-27 05:00:00", False),
    ],
)
def test_schedules(entry: str, at: str, holds: bool) -> None:
    when = datetime.fromisoformat(at).replace(tzinfo=UTC)
    assert ScheduledMinimum.parse(entry).holds(when) is holds
    assert config(schedule=(entry,)).minimum(when.timestamp()) == (3 if holds else 1)


def test_the_controller_can_import_it_quickly() -> None:
    code = "import sys, cluster.policy; print(*sorted(name for name in sys.modules if name.partition('.')[0] in "
    code += "('ray', 'grpc', 'torch', 'numpy', 'google', 'opentelemetry')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_values_travel() -> None:
    scaler = Scaler(config(schedule=("mon 12:01-13:00 4",)))
    scaler.see(demand(30))
    assert pickle.loads(pickle.dumps(scaler.last)) == scaler.last


CONFIGS = st.builds(
    lambda low, extra, up, down, zero, step_up, step_down, places: config(
        min_replicas=low,
        max_replicas=max(low + extra, 1),
        target_sequences=places,
        upscale_delay_s=up,
        downscale_delay_s=down,
        zero_delay_s=zero,
        max_step_up=step_up,
        max_step_down=step_down,
    ),
    st.integers(0, 3),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.25, 2.0]),
    st.sampled_from([0.0, 3.0, 10.0]),
    st.sampled_from([0.0, 5.0]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from([0.5, 1.0, 4.0, 64.0]),
)
AMOUNTS = st.one_of(st.none(), st.just(0.0), st.floats(0, 100), st.integers(0, 40).map(float))
HISTORIES = st.lists(st.tuples(AMOUNTS, st.sampled_from([0.05, 0.25, 1.0, 4.0])), max_size=40)


def told(amount: float | None) -> Demand | None:
    return None if amount is None else demand(amount, is_idle=not amount)


def play(scaling: ScalingConfig, history: list[tuple[float | None, float]], target: int) -> Scaler:
    scaler = Scaler(scaling, target)
    for amount, seconds in history:
        before, within = scaler.last.target, scaling.min_replicas <= scaler.last.target <= scaling.max_replicas
        after = scaler.see(told(amount), seconds)
        assert scaling.min_replicas <= after <= scaling.max_replicas
        peaks = scaler.last.state.peaks
        assert sorted(peaks) == list(peaks)
        assert sorted(peaks, key=lambda peak: -peak[1]) == list(peaks)
        if within:
            assert amount is not None or after == before
            assert not scaling.max_step_up or not before or after - before <= scaling.max_step_up
            assert not scaling.max_step_down or before - after <= scaling.max_step_down
    return scaler


@settings(max_examples=80, deadline=None)
@given(CONFIGS, HISTORIES, st.integers(0, 20))
def test_bounds_and_steps_always_hold(
    scaling: ScalingConfig, history: list[tuple[float | None, float]], target: int
) -> None:
    play(scaling, history, target)


@settings(max_examples=80, deadline=None)
@given(CONFIGS, HISTORIES, st.floats(0, 100), st.floats(0, 100))
def test_more_demand_never_means_fewer(
    scaling: ScalingConfig, history: list[tuple[float | None, float]], one: float, other: float
) -> None:
    scaler = play(scaling, history, 1)
    less, more = sorted((one, other))
    results = [desired_replicas(told(each), scaling, scaler.last.state, scaler.now + 1) for each in (less, more)]
    assert results[0].target <= results[1].target


@settings(max_examples=80, deadline=None)
@given(CONFIGS, HISTORIES, st.floats(0, 100), st.sampled_from([0.1, 0.25, 1.0]))
def test_a_constant_demand_moves_the_number_one_way_only(
    scaling: ScalingConfig, history: list[tuple[float | None, float]], amount: float, period_s: float
) -> None:
    """Up and then still, or down and then still: whatever was before."""
    scaler = play(scaling, history, 1)
    targets = [scaler.last.target]
    for _ in range(120):
        targets.append(scaler.see(told(amount), period_s))
    first_down = next((i for i in range(1, len(targets)) if targets[i] < targets[i - 1]), len(targets))
    assert all(after <= before for before, after in pairwise(targets[first_down:]))
