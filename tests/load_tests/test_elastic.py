"""Rigs of elasticity: shapes of load, what is counted of answers and idle processes, and when a bar is met."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from octavo.client import Delta, Finish, FinishReason

from load_tests.bars import Bar
from load_tests.bench_elastic import SUITE
from load_tests.notes import Notes
from load_tests.rigs import elastic_change, elastic_flap, elastic_idle, elastic_nodes, elastic_step, elastic_zero
from load_tests.rigs.elastic_idle import kind_of, table
from load_tests.rigs.elastic_load import Crowd, constant, noisy, outcome, square
from load_tests.rigs.fake_nodes import AUTOSCALERS
from load_tests.rigs.resume_asks import fake_asks
from load_tests.rigs.resume_stream import Stream

JUDGES: dict[str, Callable[[Notes], list[Bar]]] = {
    "elastic_step": elastic_step.judge,
    "elastic_flap": elastic_flap.judge,
    "elastic_nodes": elastic_nodes.judge,
    "elastic_change": elastic_change.judge,
    "elastic_zero": elastic_zero.judge,
    "elastic_idle": elastic_idle.judge,
}


def test_every_family_of_the_bench_has_a_judge() -> None:
    assert set(SUITE.families.values()) == JUDGES.keys()


@pytest.mark.parametrize("rig", JUDGES)
def test_what_was_not_measured_meets_no_bar(rig: str) -> None:
    bars = JUDGES[rig](Notes())
    assert bars
    assert [bar.bar for bar in bars if bar.ok] == []


def test_a_constant_load_is_one() -> None:
    assert {constant(7)(at) for at in (0.0, 3.5, 1e6)} == {7}


def test_a_square_wave_is_high_for_half_its_period() -> None:
    wave = square(9, 2, period_s=30)
    assert [wave(at) for at in (0, 14.9, 15, 29.9, 30, 45)] == [9, 9, 2, 2, 9, 2]


def test_noise_stays_within_its_share_and_is_the_same_each_time() -> None:
    noise = noisy(100, 0.2, every_s=1.0, seed=1)
    levels = [noise(at / 2) for at in range(200)]
    assert levels == [noise(at / 2) for at in range(200)]
    assert levels[::2] == levels[1::2]
    assert len(set(levels)) > 20
    assert 80 <= min(levels) < 90
    assert 110 < max(levels) <= 120


class ScriptedClient:
    """Ends each answer after a moment, and counts how many are open."""

    def __init__(self) -> None:
        self.most_open = self.num_open = 0

    def generate(self, prompt: Any, *, timeout: float | None, **options: Any) -> ScriptedAnswer:
        return ScriptedAnswer(self, options["max_tokens"])


class ScriptedAnswer:
    decision = None

    def __init__(self, client: ScriptedClient, num_tokens: int) -> None:
        self._client = client
        self._num_tokens = num_tokens

    async def __aiter__(self) -> AsyncIterator[Delta]:
        self._client.num_open += 1
        self._client.most_open = max(self._client.most_open, self._client.num_open)
        await asyncio.sleep(0.05)
        self._client.num_open -= 1
        yield Delta("", tuple(range(self._num_tokens)), token_offset=0, finish=Finish(FinishReason.LENGTH))


class EndOfTestError(Exception):
    """What was to be seen has been."""


async def test_a_crowd_keeps_open_what_its_shape_says_and_lets_all_end() -> None:
    client, seen = ScriptedClient(), list[int]()

    def shape(at: float) -> int:
        seen.append(crowd.num_open)
        if len(crowd.streams) < 12:
            return 4
        if seen[-1] == 1:
            raise EndOfTestError
        return 1

    async with Crowd(client, tokens=3) as crowd:  # type: ignore[arg-type]  # all of a client that a crowd uses
        with pytest.raises(EndOfTestError):
            await crowd.follow(shape, 60.0)
        assert crowd.num_open == 1
    assert crowd.num_open == client.num_open == 0
    assert client.most_open == 4
    assert len(crowd.streams) >= 12
    assert all(stream.is_ended for stream in crowd.streams)


def answered(tokens: int | None = None, error: str = "", attempts: int = 1) -> Stream:
    """An answer of four tokens, the first `tokens` of which came."""
    (ask,) = fake_asks(1, 4, random.Random(3))
    assert ask.reference is not None
    stream = Stream(ask)
    finish = Finish(FinishReason.LENGTH) if tokens is None else None
    stream.took(Delta("", ask.reference[:tokens], token_offset=0, finish=finish), 1.0)
    stream.is_ended, stream.error, stream.attempts = True, error, attempts
    return stream


def test_answers_are_counted_by_what_came_of_them() -> None:
    other = answered()
    other.token_ids[2] += 1
    figures = outcome([answered(), answered(attempts=2), answered(2), answered(error="UNAVAILABLE/"), other])
    assert figures["sent"] == figures["ended"] == 5
    assert (figures["right"], figures["wrong"], figures["handed_over"]) == (2, 3, 1)
    assert figures["wrongs"] == {"lost": 2, "different": 1}
    assert figures["errors"] == {"UNAVAILABLE/": 1}


def test_an_answer_whose_finish_is_missing_is_not_right() -> None:
    stream = answered()
    stream.finish = None
    assert outcome([stream])["wrong"] == 1


COMMANDS = {
    "/x/ray/core/src/ray/raylet/raylet --agent=python ray/dashboard/agent.py --x": "raylet",
    "/x/ray/core/src/ray/gcs/gcs_server --log_dir=/tmp": "GCS",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime-env agent",
    "/x/python -u /x/ray/_private/log_monitor.py --session-dir=x": "log monitor",
    "/x/python -u /x/ray/autoscaler/_private/monitor.py --logs-dir=x": "autoscaler monitor",
    "ray::ServeController.listen_for_change": "Serve controller",
    "ray::ServeReplica:octavo:Router.x": "router",
    "ray::ServeReplica:octavo:Worker": "replica",
    "ray::ServeReplica:octavo:Worker-small": "replica",
    "ray::IDLE": "idle worker",
    "/x/python -m cluster.cli serve --port 0": "octavo serve",
    "/bin/sh": "other",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_process_is_of_the_kind_that_its_command_line_says(command: str) -> None:
    assert kind_of(command) == COMMANDS[command]


def test_idle_processes_are_summed_by_kind() -> None:
    mib = 2**20
    before = {1: ("replica", 90 * mib, 1.0), 2: ("raylet", 20 * mib, 2.0), 9: ("idle worker", 40 * mib, 0.1)}
    after = {1: ("replica", 100 * mib, 1.6), 2: ("raylet", 20 * mib, 3.2), 3: ("replica", 50 * mib, 0.3)}
    assert table(before, after, 60.0) == {
        "kinds": {"replica": [2, 150.0, 0.015], "raylet": [1, 20.0, 0.02]},
        "all_mib": 170.0,
        "without_replicas_mib": 20.0,
        "cores": 0.035,
        "seconds": 60.0,
    }


GOOD_STEP = {
    "sent": 100,
    "wrong": 0,
    "new": 1,
    "raised_s": 0.4,
    "first_serves_s": 3.0,
    "last_serves_s": 3.0,
    "own_start_s": 2.5,
    "extra_max_s": 0.6,
    "back_s": 5.3,
    "gone_s": 6.0,
}


def step_bars(**changed: Any) -> dict[str, Bar]:
    notes = Notes()
    notes.add(elastic_step.SINGLE, **GOOD_STEP)
    notes.add(elastic_step.STEP, **GOOD_STEP | {"new": 4, "first_serves_s": 4.5, "last_serves_s": 7.0} | changed)
    return {bar.bar.removeprefix("load step: ").partition(",")[0]: bar for bar in elastic_step.judge(notes)}


def test_a_step_in_time_meets_its_bars() -> None:
    assert [name for name, bar in step_bars().items() if not bar.ok] == []


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"raised_s": 1.1}, "target raised after the backlog appeared"),
        ({"raised_s": None}, "target raised after the backlog appeared"),
        ({"extra_max_s": 2.2}, "new replicas serve after the backlog appeared"),
        ({"extra_max_s": None}, "new replicas serve after the backlog appeared"),
        ({"back_s": 6.1}, "target back at the minimum"),
        ({"wrong": 1}, "answers lost"),
    ],
)
def test_a_step_that_is_late_or_loses_something_misses_a_bar(changed: dict[str, Any], missed: str) -> None:
    assert [name for name, bar in step_bars(**changed).items() if not bar.ok] == [missed]


@pytest.mark.parametrize(
    ("what", "figure"), [("square wave", "turns"), ("constant", "changes_settled"), ("noise", "turns")]
)
def test_one_flap_is_one_too_many(what: str, figure: str) -> None:
    good = {"sent": 10, "wrong": 0, "turns": 0, "changes_settled": 0, "targets": [1, 3]}
    notes = Notes({"what": load, **good} for load in elastic_flap.LOADS)
    assert all(bar.ok for bar in elastic_flap.judge(notes))
    notes.add(what, **good | {figure: 1})
    assert sum(not bar.ok for bar in elastic_flap.judge(notes)) == 1


@pytest.mark.parametrize("changed", [{"most_nodes": 2}, {"first_nodes": 2}, {"last_nodes": 2}, {"wrong": 1}])
def test_nodes_that_do_not_come_or_go_miss_a_bar(changed: dict[str, int]) -> None:
    good = {"sent": 9, "wrong": 0, "first_nodes": 1, "most_nodes": 3, "last_nodes": 1, "up_s": 9.0, "back_s": 20.0}
    notes = Notes({"what": autoscaler, **good} for autoscaler in AUTOSCALERS)
    assert all(bar.ok for bar in elastic_nodes.judge(notes))
    notes = Notes({"what": autoscaler, **good | changed} for autoscaler in AUTOSCALERS)
    assert sum(not bar.ok for bar in elastic_nodes.judge(notes)) == len(AUTOSCALERS)


@pytest.mark.parametrize("changed", [{"wrong": 1}, {"handed_over": 0}, {"through_s": None}, {"replaced": 0}])
def test_a_change_that_clients_notice_or_that_changed_nothing_misses_a_bar(changed: dict[str, Any]) -> None:
    good = {
        "sent": 40,
        "wrong": 0,
        "handed_over": 8,
        "to_replace": 1,
        "replaced": 1,
        "through_s": 9.0,
        "gap_max_s": 0.2,
        "fewest_ready": 2,
    }
    notes = Notes({"what": change, **good} for change in elastic_change.CHANGES)
    assert all(bar.ok for bar in elastic_change.judge(notes))
    notes = Notes({"what": change, **good | changed} for change in elastic_change.CHANGES)
    assert sum(not bar.ok for bar in elastic_change.judge(notes)) == len(elastic_change.CHANGES)


@pytest.mark.parametrize("changed", [{"wrong": 1}, {"was_none": False}, {"refused_s": None}, {"refused_s": 0.9}])
def test_a_start_from_zero_that_is_late_or_tells_late_misses_a_bar(changed: dict[str, Any]) -> None:
    good = {
        "sent": 8,
        "wrong": 0,
        "was_none": True,
        "answered_s": 6.0,
        "serves_s": 4.0,
        "refused_s": 0.02,
        "refusal": "RESOURCE_EXHAUSTED/DEADLINE_TOO_SHORT",
    }
    assert all(bar.ok for bar in elastic_zero.judge(Notes([{"what": elastic_zero.FROM_ZERO, **good}])))
    bars = elastic_zero.judge(Notes([{"what": elastic_zero.FROM_ZERO, **good | changed}]))
    assert sum(not bar.ok for bar in bars) == 1


def test_an_idle_cluster_is_held_to_its_size_and_says_what_it_is_made_of() -> None:
    row = {"kinds": {"replica": [2, 300.0, 0.03], "raylet": [1, 26.0, 0.02]}, "all_mib": 326.0, "cores": 0.05}
    bars = elastic_idle.judge(Notes([{"what": "idle", **row, "without_replicas_mib": 26.0}]))
    assert all(bar.ok for bar in bars)
    assert "2 replica 300, 1 raylet 26" in bars[0].detail
    bars = elastic_idle.judge(Notes([{"what": "idle", **row, "without_replicas_mib": 800.0, "cores": 0.3}]))
    assert not any(bar.ok for bar in bars)
