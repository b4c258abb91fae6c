"""What routers' reports add up to."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.autoscaling import Demand
from cluster.demand import FRESH_S, IDLE_S, KEEP_S, DemandMeter
from router.signal import REPORT_PERIOD_S, ModelSignal


class Meter:
    """A meter that is told and asked every quarter of a second."""

    def __init__(self) -> None:
        self.meter = DemandMeter()
        self.now = 100.0
        self.totals = {"num_arrived_total": 0, "num_turned_away_total": 0, "num_ended_total": 0, "served_s_total": 0.0}

    def see(self, *, router: str = "a", epoch: int = 1, **fields: Any) -> None:
        """Report; counts say how many there are more."""
        for name in self.totals:
            self.totals[name] += fields.pop(name.removesuffix("_total"), 0)
        self.meter.add(router, epoch, ModelSignal(**{**self.totals, **fields}), self.now)

    def ask(self, seconds: float = REPORT_PERIOD_S, **options: Any) -> Demand | None:
        self.now += seconds
        return self.meter.measure(self.now, **options)

    def places(self, **options: Any) -> float:
        demand = self.ask(**options)
        assert demand is not None
        return demand.sequences

    def answer(self, count: int, service_s: float) -> None:
        """So many have come and gone again."""
        self.see(num_arrived=count, num_ended=count, served_s=count * service_s, num_aboard=1)
        self.ask()


def test_nobody_has_said_anything() -> None:
    meter = Meter()
    assert meter.ask() is None
    meter.see(num_queued=3)
    assert meter.places() == 3
    assert meter.ask(KEEP_S) is None


def test_all_that_waits_counts_while_nobody_knows_how_long_answers_take() -> None:
    meter = Meter()
    meter.see()
    meter.see(num_aboard=4, num_queued=30, num_arrived=34)
    demand = meter.ask()
    assert demand is not None
    assert (demand.sequences, demand.at_most, demand.is_idle) == (34, 34, False)
    assert demand.cause == "4 running, 30 waiting"


def test_what_runs_counts_once_and_what_waits_of_every_router() -> None:
    meter = Meter()
    meter.see(router="a", num_aboard=6, num_queued=1)
    meter.see(router="b", num_aboard=5, num_queued=2)
    assert meter.places() == 9


def test_a_router_that_is_silent_counts_no_more_but_keeps_the_signal() -> None:
    meter = Meter()
    meter.see(router="a", num_aboard=6, num_queued=10)
    meter.ask(FRESH_S + 0.1)
    meter.see(router="b", num_aboard=3, num_queued=10)
    assert meter.places() == 13
    assert meter.places(seconds=KEEP_S - REPORT_PERIOD_S) == 13  # nobody else has said anything since


def test_a_backlog_of_short_answers_needs_few_places() -> None:
    meter = Meter()
    meter.see()
    meter.answer(40, 0.1)
    for _ in range(30):  # what has come already is no load that goes on
        meter.see(num_aboard=4)
        meter.ask()
    meter.see(num_aboard=4, num_queued=100)
    meter.ask()
    for _ in range(24):
        meter.see(num_aboard=4, num_queued=100)
        demand = meter.ask(start_s=1.0)
    assert demand is not None
    assert (demand.sequences, demand.at_most) == (4, 104)


def test_a_load_that_goes_on_needs_its_places_and_the_backlog_little_more() -> None:
    meter = Meter()
    meter.see()
    meter.answer(100, 2.0)
    for number in range(1, 20):
        meter.see(num_aboard=10, num_queued=10 * number, num_arrived=10, num_ended=0)
        places = meter.places(start_s=2.0)
    assert 80 <= places <= 80 + 190 * 2 / 24 + 1  # 40 a second for 2 s, and the backlog within 24 s


def test_a_backlog_that_stays_counts_for_more_and_more() -> None:
    meter = Meter()
    meter.see()
    meter.answer(100, 0.5)
    for _ in range(40):
        meter.see(num_aboard=1)
        meter.ask()
    seen = []
    for _ in range(4 * 40):
        meter.see(num_aboard=10, num_queued=100)
        seen.append(meter.places(start_s=1.0))
    assert seen[4 * 9] == 10
    assert seen[-1] == 110
    # Not while somebody who is to help is starting, nor once it drains.
    meter.see(num_aboard=10, num_queued=100)
    assert meter.places(start_s=1.0, is_starting=True) == 10
    meter.see(num_aboard=10, num_queued=80)
    assert meter.places(start_s=1.0) == 10


def test_answers_that_take_longer_than_those_before_are_noticed_before_they_end() -> None:
    meter = Meter()
    meter.see()
    meter.answer(1_000, 0.05)
    meter.see(num_aboard=10, num_running=10, num_queued=90, num_arrived=100)
    for number in range(1, 13):
        meter.see(num_aboard=10, num_running=10, num_queued=90, running_s=10 * number * REPORT_PERIOD_S)
        places = meter.places()
    assert places == pytest.approx(100, abs=15)


def test_what_was_turned_away_is_demand() -> None:
    meter = Meter()
    meter.see()
    meter.answer(10, 1.0)
    for _ in range(20):
        meter.see(num_aboard=10, num_queued=1, num_arrived=10, num_turned_away=8, num_ended=2, served_s=2.0)
        demand = meter.ask(start_s=1.0)
    assert demand is not None
    assert demand.sequences == pytest.approx(40, abs=4)
    assert demand.cause == "10 running, 1 waiting, 32.0 a second turned away"


def test_counts_of_another_process_are_no_arrivals() -> None:
    meter = Meter()
    meter.see(num_arrived=1_000, num_turned_away=1_000)
    assert meter.places() == 0
    meter.see(epoch=2, num_arrived=1_000, num_turned_away=1_000)
    assert meter.places() == 0
    demand = meter.ask(IDLE_S)
    assert demand is not None
    assert demand.is_idle


def test_what_came_during_a_silence_has_come() -> None:
    meter = Meter()
    meter.see()
    assert meter.ask(KEEP_S + 1) is None
    meter.see(num_arrived=1, num_turned_away=1)
    demand = meter.ask()
    assert demand is not None
    assert not demand.is_idle


def test_it_is_idle_once_nothing_has_come_for_a_moment() -> None:
    meter = Meter()
    meter.see()
    for fields in ({"num_arrived": 1, "num_ended": 1}, {"num_aboard": 1}, {"num_queued": 1}):
        meter.see(**fields)
        demand = meter.ask()
        assert demand is not None
        assert not demand.is_idle
    meter.see()
    demand = meter.ask(IDLE_S)
    assert demand is not None
    assert demand.is_idle
