"""Closed loop: load makes demand, demand replicas, and these serve the load. Their number follows, and keeps still."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import pytest

from cluster.autoscaling import ScalingConfig
from tests.scaling.scaling_simulation import PLACES, Simulation


def config(**fields: Any) -> ScalingConfig:
    made = ScalingConfig(**{"max_replicas": 20, **fields})
    made.check()
    return made


def loaded(share: float, service_s: float = 1.0) -> dict[str, Any]:
    """A load that keeps so many replicas busy, by clients that come whatever happens."""
    return {"rate": lambda _: share * PLACES / service_s}


def kept(share: float) -> dict[str, Any]:
    """The same, by clients each of which asks again when it has its answer."""
    return {"clients": lambda _: share * PLACES}


def num_turns(targets: list[int]) -> int:
    """Return how often the number began to fall after it had risen, or to rise after it had fallen."""
    steps = [after > before for before, after in pairwise(targets)]
    return sum(step != before for before, step in pairwise(steps))


STEPS = [(start_s, service_s) for start_s in (1.0, 3.0, 10.0) for service_s in (0.3, 1.0, 4.0)][::2]


@pytest.mark.parametrize(("start_s", "service_s"), STEPS)
@pytest.mark.parametrize("way", ["rate", "clients"])
def test_a_step_to_five_replicas_of_load(way: str, start_s: float, service_s: float) -> None:
    cluster = Simulation(scaling=config(), start_s=start_s, service_s=service_s).run(5.0)
    cluster.run(120, **(loaded(5, service_s) if way == "rate" else kept(5)))
    assert cluster.backlog_at is not None
    assert cluster.reached_at(2) - cluster.backlog_at <= 1.0
    # As much of the load has to come first: of clients that all come at once it is there at once.
    assert cluster.reached_at(5) - cluster.backlog_at <= (1.0 if way == "clients" else service_s + 1.0)
    assert cluster.highest <= 6
    assert num_turns(cluster.since(0)) == 0
    assert cluster.num_queued <= PLACES
    gone_at = cluster.now
    cluster.run(10 + 60 + 10)
    assert cluster.target == 1
    left_at = next(at for at, target in cluster.targets if at > gone_at and target == 1)
    assert left_at - gone_at - service_s <= 60 + 6 + 1
    assert num_turns(cluster.since(0)) == 1


@pytest.mark.parametrize("num_routers", [1, 2])
@pytest.mark.parametrize("num_replicas", [1, 2, 5])
@pytest.mark.parametrize("way", ["rate", "clients"])
def test_a_constant_load_of_exactly_so_many_replicas(way: str, num_replicas: int, num_routers: int) -> None:
    cluster = Simulation(scaling=config(), num_replicas=num_replicas, num_routers=num_routers)
    cluster.run(150, **(loaded(num_replicas) if way == "rate" else kept(num_replicas)))
    assert cluster.since(0) == [num_replicas]


@pytest.mark.parametrize("service_s", [0.5, 5.0])
def test_noise_of_a_fifth(service_s: float) -> None:
    for seed in range(2):
        rng = random.Random(seed)
        factors = [rng.uniform(0.8, 1.2) for _ in range(1_000)]
        cluster = Simulation(scaling=config(), num_replicas=3, service_s=service_s)
        cluster.run(200, rate=lambda t, factors=factors: factors[int(t)] * 3.5 * PLACES / service_s)  # type: ignore[misc]
        assert num_turns(cluster.since(0)) == 0
        assert set(cluster.since(60)) <= {4, 5}


@pytest.mark.parametrize("seed", range(3))
def test_arrivals_by_chance(seed: int) -> None:
    cluster = Simulation(scaling=config(), num_replicas=4, rng=random.Random(seed), num_routers=2)
    cluster.run(300, **loaded(3.4))
    assert len(set(cluster.since(0))) <= 2
    assert num_turns(cluster.since(0)) <= 1


@pytest.mark.parametrize("way", ["rate", "clients"])
def test_a_square_wave_of_30_s(way: str) -> None:
    """15 s of load and 15 s without; the number stays where load needs it, and goes down once after the last."""

    def wave(t: float) -> float:
        return 4.0 * PLACES if t % 30 < 15 else 0.2 * PLACES

    cluster = Simulation(scaling=config(), start_s=3.0)
    cluster.run(240, **{way: wave})
    assert 4 <= cluster.target <= 6
    assert num_turns(cluster.since(0)) == 0
    assert cluster.since(60) == [cluster.target]
    cluster.run(90)
    assert cluster.target == 1
    assert num_turns(cluster.since(0)) == 1


def test_a_ramp_is_followed_up_and_down() -> None:
    cluster = Simulation(scaling=config())
    cluster.run(150, rate=lambda t: 6 * PLACES * t / 150)
    assert 6 <= cluster.target <= 7
    assert num_turns(cluster.since(0)) == 0
    assert cluster.num_queued <= 3 * PLACES
    cluster.run(150, rate=lambda t: 6 * PLACES * max(300 - t, 0) / 150)
    cluster.run(70)
    assert cluster.target == 1
    assert num_turns(cluster.since(0)) == 1


def test_a_short_spike_adds_little_and_nothing_flaps() -> None:
    """Half a second of ten times the load, each minute: at most about half of what that would take is added."""
    cluster = Simulation(scaling=config(), num_replicas=2)
    cluster.run(20, **loaded(1.5))
    cluster.run(240, rate=lambda t: (15 if t % 60 < 0.5 else 1.5) * PLACES)
    assert cluster.highest <= 8
    assert num_turns(cluster.since(0)) <= 1
    assert len(cluster.since(180)) == 1


def test_a_load_that_is_turned_away_is_demand() -> None:
    """The queue holds half of what a replica serves at once; nine tenths of the load are refused."""
    cluster = Simulation(scaling=config(), max_queued=PLACES // 2)
    cluster.run(60, **loaded(5))
    assert 5 <= cluster.target <= 7
    before = cluster.routers[0].num_turned_away
    cluster.run(30, **loaded(5))
    assert cluster.routers[0].num_turned_away == before


def test_to_zero_and_from_zero() -> None:
    cluster = Simulation(scaling=config(min_replicas=0, zero_delay_s=30), num_replicas=1)
    cluster.run(20, **loaded(0.5))
    cluster.run(29)
    assert cluster.target == 1
    cluster.run(4)
    assert cluster.target == 0
    assert cluster.reasons[-1] == "no request in 30 s"
    at = cluster.now
    cluster.run(1.3, rate=lambda _: 1)
    assert cluster.target == 1
    cluster.run(10)
    assert (cluster.num_queued, cluster.num_running) == (0, 0)
    assert cluster.since(at) == [0, 1]


def test_one_request_now_and_then_keeps_the_last_replica() -> None:
    """Each is over before anybody sees it run."""
    cluster = Simulation(scaling=config(min_replicas=0, zero_delay_s=20), service_s=0.05)
    cluster.run(120, rate=lambda t: 20 if t % 15 < 0.05 else 0)
    assert cluster.since(0) == [1]


def test_a_step_from_zero_replicas() -> None:
    cluster = Simulation(scaling=config(min_replicas=0), num_replicas=1)
    cluster.run(10, **loaded(0.5)).run(310)
    assert cluster.target == 0
    at = cluster.now
    cluster.run(60, **loaded(5))
    assert cluster.reached_at(5) - at <= 10
    assert max(cluster.since(at)) <= 7
    assert num_turns(cluster.since(at)) == 0


def test_a_silent_signal_holds_the_number() -> None:
    cluster = Simulation(scaling=config(), num_replicas=1)
    cluster.run(30, **loaded(3))
    target = cluster.target
    assert target >= 3
    cluster.is_silent = True
    cluster.run(200)
    assert cluster.target == target
    cluster.is_silent = False
    cluster.run(59)
    assert cluster.target == target  # what was before the silence says nothing of what was in it
    cluster.run(10)
    assert cluster.target == 1


@pytest.mark.parametrize("share", [0.9, 3.0])
def test_two_routers_and_one_that_dies(share: float) -> None:
    """What replicas had of it is aborted, and its clients come to the other one: the load stays what it was."""
    cluster = Simulation(scaling=config(), num_replicas=max(1, round(share)), num_routers=2)
    cluster.run(60, **kept(share))
    before = cluster.since(0)
    cluster.kill_router()
    cluster.run(120, **kept(share))
    assert cluster.since(0) == before


def test_all_routers_die() -> None:
    cluster = Simulation(scaling=config(), num_replicas=3, num_routers=1)
    cluster.run(30, **kept(3))
    cluster.routers.clear()
    cluster.run(300)
    assert cluster.target == 3


def test_a_scheduled_minimum_at_its_edges() -> None:
    """The simulated clock begins on a Sunday, at 01:46:40 UTC."""
    begin = datetime.fromtimestamp(1_000_000_000, UTC)
    assert (begin.weekday(), begin.hour, begin.minute, begin.second) == (6, 1, 46, 40)
    cluster = Simulation(scaling=config(schedule=("sun 01:48-01:50 3", "sun 01:49-01:51 2")))
    cluster.run(79.5)
    assert cluster.target == 1
    cluster.run(1.0)
    assert cluster.target == 3
    cluster.run(119)
    assert cluster.target == 3
    cluster.run(5)
    assert cluster.target == 2
    cluster.run(60)
    assert cluster.target == 1
    assert cluster.since(0) == [1, 3, 2, 1]


def test_load_counts_beside_a_schedule() -> None:
    cluster = Simulation(scaling=config(schedule=("sun 01:47-01:49 2",)))
    cluster.run(60, **kept(4))
    assert cluster.target == 4
    cluster.run(120, **kept(4))
    assert cluster.since(60) == [4]


def test_a_fixed_number_stays_under_any_load() -> None:
    cluster = Simulation(scaling=ScalingConfig(), num_replicas=2)
    cluster.run(60, **loaded(5))
    cluster.run(400)
    assert cluster.since(0) == [2]
