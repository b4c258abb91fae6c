"""What follows from samples of a cluster under a changing load: turns, delays, peaks."""

from __future__ import annotations

import pytest
from octavo.v1.status_service_pb2 import GetStatusResponse, ModelStatus, ReplicaStatus, RouterStatus

from load_tests.rigs.elastic_flap import flap_figures
from load_tests.rigs.elastic_nodes import nodes_figures
from load_tests.rigs.elastic_step import step_figures
from load_tests.rigs.elastic_timeline import Sample, Timeline, changes, turns
from load_tests.rigs.elastic_watch import sample as told


def sample(
    at: float,
    target: int | None = 1,
    *,
    ready: tuple[str, ...] = ("a",),
    starting: tuple[str, ...] = (),
    queued: int = 0,
    running: int = 0,
    nodes: int = 1,
) -> Sample:
    states = dict.fromkeys(ready, "ready") | dict.fromkeys(starting, "connecting")
    return Sample(at=at, target=target, states=states, num_queued=queued, num_running=running, num_nodes=nodes)


@pytest.mark.parametrize(
    ("values", "number"),
    [([], 0), ([3], 0), ([1, 3, 5], 0), ([5, 3, 1], 0), ([1, 3, 1], 1), ([1, 2, 5, 3], 1), ([1, 2, 1, 2], 2)],
)
def test_a_turn_is_where_a_target_goes_the_other_way(values: list[int], number: int) -> None:
    assert turns(values) == number


def test_what_nobody_said_is_no_change() -> None:
    assert changes([None, 1, 1, None, 1, 3, None, 2]) == [1, 3, 2]


def test_a_timeline_tells_when_something_first_and_last_was_so() -> None:
    timeline = Timeline([sample(1, queued=2), sample(2), sample(3, queued=1), sample(4)])
    assert timeline.first(lambda each: each.num_queued) == 1
    assert timeline.first(lambda each: each.num_queued, 2) == 3
    assert timeline.last(lambda each: each.num_queued) == 3
    assert timeline.first(lambda each: each.num_nodes > 1) is None
    assert timeline.last(lambda each: each.num_nodes > 1) is None
    assert [each.at for each in timeline.between(2, 3).samples] == [2, 3]


def test_a_timeline_is_noted_by_what_changed() -> None:
    timeline = Timeline([sample(10), sample(11, 2), sample(12, 2, ready=("a", "b"), nodes=2), sample(13, 2)])
    assert timeline.figures(10) == {
        "targets": [[0, 1], [1, 2]],
        "ready": [[0, 1], [2, 2], [3, 1]],
        "nodes": [[0, 1], [2, 2], [3, 1]],
    }


STEP = Timeline(
    [
        sample(9.9),
        sample(10.1, queued=32, running=8),
        sample(10.6, 5, queued=30, running=8),
        sample(13.0, 5, ready=("a", "b"), starting=("c",), queued=3, running=16),
        sample(14.5, 5, ready=("a", "b", "c"), running=20),
        sample(15.0, 5, ready=("a", "b", "c")),
        sample(20.2, 1, ready=("a", "b", "c")),
        sample(21.0),
    ]
)


def test_a_step_is_measured_from_its_backlog_on() -> None:
    figures = step_figures(STEP, {"a": 1.0, "b": 11.0, "c": 11.5}, 10.0)
    assert figures == {
        "new": 2,
        "raised_s": 0.5,
        "first_serves_s": 2.9,
        "last_serves_s": 4.4,
        "own_start_s": 3.0,
        "extra_max_s": 1.4,
        "back_s": 5.7,
        "gone_s": 6.5,
    }


def test_what_a_step_did_not_bring_is_not_measured() -> None:
    figures = step_figures(Timeline([sample(10, None), sample(11, None, queued=2)]), {}, 10.0)
    assert figures["new"] == 0
    assert {name for name, value in figures.items() if value is None} == figures.keys() - {"new"}


def test_a_process_that_was_there_before_the_load_does_not_lengthen_a_start() -> None:
    assert step_figures(STEP, {"a": 1.0, "b": 2.0, "c": 2.0}, 10.0)["own_start_s"] == 4.5


def test_a_flap_counts_while_the_load_is_there() -> None:
    timeline = Timeline([sample(0), sample(1, 4), sample(5, 3), sample(9, 3), sample(20, 1)])
    figures = flap_figures(timeline, 0, 10, 2)
    assert figures == {"turns": 1, "turns_settled": 0, "changes_settled": 0, "targets": [1, 4, 3]}
    assert flap_figures(Timeline([sample(0, None)]), 0, 1, 0)["turns"] is None


def test_nodes_are_counted_from_before_the_load_until_after_it() -> None:
    three = ("a", "b", "c")
    timeline = Timeline([sample(0), sample(4, 3, nodes=3), sample(6, 3, ready=three, nodes=3), sample(30)])
    assert nodes_figures(timeline, 1, 10) == {
        "first_nodes": 1,
        "most_nodes": 3,
        "last_nodes": 1,
        "up_s": 5.0,
        "back_s": 20.0,
    }
    assert nodes_figures(Timeline([sample(0), sample(4, 3, nodes=3)]), 1, 10)["up_s"] is None


def test_a_sample_is_what_a_router_says() -> None:
    status = GetStatusResponse(
        router=RouterStatus(num_queued_requests=4, num_running_requests=8),
        replicas=[ReplicaStatus(id="a", state="ready"), ReplicaStatus(id="b", state="starting")],
        models=[ModelStatus(name="fake", has_outlook=True, target=2)],
    )
    found = told(status, 7.0, 3)
    assert (found.at, found.target, found.num_nodes) == (7.0, 2, 3)
    assert (found.num_queued, found.num_running) == (4, 8)
    assert (found.ready, found.states) == ({"a"}, {"a": "ready", "b": "starting"})
    status.models[0].has_outlook = False
    assert told(status, 7.0, 3).target is None
