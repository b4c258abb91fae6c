"""What is said of answers that were asked for while faults struck, which faults strike when, and when a bar is met."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from octavo.client import Delta, Finish, FinishReason
from octavo.v1.status_service_pb2 import GetStatusResponse, ReplicaStatus, RouterStatus

from load_tests.chaos.capacity import View
from load_tests.chaos.families import FAMILIES
from load_tests.chaos.plan import Fault, plan
from load_tests.chaos.report import answers, effects, faults_of, judge
from load_tests.chaos.strikes import NODE_LOST, STRIKES
from load_tests.chaos.verdict import Reply, Struck, content, is_allowed, longest_pause_s, verdict
from load_tests.notes import Notes, judge_terminals
from load_tests.rigs.resume_asks import Ask
from load_tests.rigs.resume_stream import Answer, Stream

LENGTH = Finish(FinishReason.LENGTH)
EXPECTED = Answer((5, 6, 7), "abc", LENGTH)
KILL = Struck(kind="replica killed", struck_s=20.0, recovery_s=6.0)


def stream(*deltas: Delta) -> Stream:
    found = Stream(Ask(name="one", kind="fake", call="session", prompt=(1, 2), options={}))
    for delta in deltas:
        found.took(delta, 0.0)
    return found


def reply(**changes: Any) -> Reply:
    good = Reply(
        name="0: one",
        content="whole",
        error="",
        begun_s=19.0,
        ended_s=21.0,
        timeout_s=60.0,
        usual_s=1.0,
        first_s=0.1,
        pauses=(),
    )
    return dataclasses.replace(good, **changes)


@pytest.mark.parametrize(
    ("deltas", "said"),
    [
        ((Delta("a", (5,)), Delta("bc", (6, 7), token_offset=1, finish=LENGTH)), "whole"),
        ((Delta("a", (5,)),), "part"),
        ((), "part"),
        ((Delta("", (5, 6, 7)),), "part"),
        ((Delta("a", (5,)), Delta("a", (5,), token_offset=0)), "repeated"),
        ((Delta("abc", (5, 6, 7)), Delta("d", (8,), token_offset=3)), "repeated"),
        ((Delta("a", (5,)), Delta("c", (7,), token_offset=2)), "repeated"),
        ((Delta("a", (5,)), Delta("b", (9,), token_offset=1)), "wrong"),
        ((Delta("a", (5,)), Delta("x", (6,), token_offset=1)), "wrong"),
        ((Delta("abc", (5, 6, 7), finish=Finish(FinishReason.STOP)),), "wrong"),
        ((Delta("ab", (5, 6, 7), finish=LENGTH),), "wrong"),
        ((Delta("ab", (5, 6), finish=LENGTH),), "part"),
    ],
)
def test_every_piece_of_an_answer_counts(deltas: tuple[Delta, ...], said: str) -> None:
    assert content(stream(*deltas), EXPECTED) == said


def test_a_deadline_must_outlast_the_recoveries_of_its_faults() -> None:
    assert is_allowed(reply(timeout_s=19.5), [KILL])
    assert not is_allowed(reply(timeout_s=19.0), [KILL])
    assert is_allowed(reply(timeout_s=None), [KILL])
    assert is_allowed(reply(timeout_s=13.5, ended_s=19.9), [KILL]), "it was over before the fault"
    assert is_allowed(reply(timeout_s=13.5, begun_s=36.5, ended_s=40.0), [KILL]), "it began long after it"
    assert not is_allowed(reply(timeout_s=13.5, begun_s=35.5, ended_s=40.0), [KILL])
    again = dataclasses.replace(KILL, struck_s=40.0)
    assert not is_allowed(reply(timeout_s=24.0, ended_s=43.0), [KILL, again])
    assert is_allowed(reply(timeout_s=26.0, ended_s=43.0), [KILL, again])
    assert not is_allowed(reply(timeout_s=60.0), [dataclasses.replace(KILL, recovery_s=None)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "right"),
        ({"content": "wrong"}, "wrong"),
        ({"content": "wrong", "ended_s": None}, "wrong"),
        ({"content": "repeated", "error": "DEADLINE_EXCEEDED/", "timeout_s": 1.0}, "repeated"),
        ({"content": "part"}, "lost"),
        ({"content": "part", "ended_s": None, "error": "no end"}, "hung"),
        ({"content": "part", "ended_s": None, "error": "no end", "timeout_s": 1.0}, "hung"),
        ({"content": "part", "error": "UNAVAILABLE/REPLICA_LOST"}, "lost"),
        ({"content": "part", "error": "UNAVAILABLE/REPLICA_LOST", "timeout_s": 5.0}, "excused"),
        ({"content": "part", "error": "DEADLINE_EXCEEDED/DEADLINE_PASSED", "timeout_s": 5.0}, "excused"),
        ({"content": "part", "error": "DEADLINE_EXCEEDED/DEADLINE_PASSED", "timeout_s": None}, "lost"),
        ({"content": "part", "error": "INTERNAL/INTERNAL", "timeout_s": 5.0}, "lost"),
        ({"content": "whole", "error": "UNAVAILABLE/SESSION_LOST"}, "lost"),
    ],
)
def test_a_reply_is_one_thing(changes: dict[str, Any], said: str) -> None:
    assert verdict(reply(**changes), [KILL]) == said


def test_a_pause_belongs_to_the_time_that_it_was_under_way() -> None:
    replies = [reply(pauses=((19.5, 22.0), (30.0, 31.0))), reply(pauses=((41.0, 45.0),))]
    assert longest_pause_s(replies, 20.0, 40.0) == 2.5
    assert longest_pause_s(replies, 22.0, 30.0) == 0.0
    assert longest_pause_s([], 0.0, 1.0) == 0.0


# Which faults strike when.


def test_a_plan_follows_from_its_seed_and_leaves_no_kind_out() -> None:
    def make(seed: int) -> list[Fault]:
        return plan(tuple(STRIKES), seed=seed, duration_s=600.0, every_s=20.0, lengths_s=(2.0, 12.0))

    faults = make(1)
    assert faults == make(1) != make(2)
    assert [fault.due_s for fault in faults] == [20.0 * number + 5.0 for number in range(30)]
    counts = Counter(fault.kind for fault in faults)
    assert counts.keys() == STRIKES.keys()
    assert max(counts.values()) - min(counts.values()) <= 1
    assert all(2.0 <= fault.length_s <= 12.0 and fault.pick("ab") in "ab" for fault in faults)
    assert {fault.pick("ab") for fault in faults} == {"a", "b"}


def test_only_the_family_with_several_nodes_loses_any() -> None:
    assert {name for name, family in FAMILIES.items() if NODE_LOST in family.kinds} == {"fake"}
    assert all(set(family.kinds) >= STRIKES.keys() - {NODE_LOST} for family in FAMILIES.values())


# Capacity.


def view(*routers: tuple[int, list[int]]) -> View:
    """A view of routers, each its pid and those of the replicas that it is ready to send to."""
    statuses = {}
    for pid, replicas in routers:
        ready = [ReplicaStatus(id=f"r{each}", pid=each, state="ready") for each in replicas]
        lost = ReplicaStatus(id="lost", pid=9, state="connecting")
        statuses[str(pid)] = GetStatusResponse(router=RouterStatus(id=str(pid), pid=pid), replicas=[*ready, lost])
    return View(1.0, statuses)


def test_capacity_is_whole_when_every_router_is_ready_for_every_replica() -> None:
    def is_whole(found: View, *gone: int) -> bool:
        return found.is_whole(routers=2, replicas=2, gone=frozenset(gone))

    assert is_whole(view((1, [3, 4]), (2, [3, 4])), 8)
    assert not is_whole(view((1, [3, 4])))
    assert not is_whole(view((1, [3, 4]), (2, [3])))
    assert not is_whole(view((1, [3, 4]), (2, [3, 4])), 4), "one of them believes in a replica that is dead"
    assert not is_whole(view((1, [3, 4]), (2, [3, 4])), 1)
    assert [each.pid for each in view((1, [4]), (2, [3, 4])).replicas] == [3, 4]


# Figures and bars.


def test_figures_of_a_run_count_every_request_once() -> None:
    replies = [
        reply(),
        reply(content="part", error="UNAVAILABLE/REPLICA_LOST"),
        reply(content="part", error="DEADLINE_EXCEEDED/DEADLINE_PASSED", timeout_s=5.0),
        reply(content="part", ended_s=None, error="no end"),
        reply(content="wrong"),
    ]
    figures = answers(replies, [KILL])
    assert (figures["sent"], figures["ended"], figures["right"], figures["excused"]) == (5, 4, 1, 1)
    assert (figures["wrong"], figures["repeated"], figures["lost"], figures["hung"]) == (1, 0, 1, 1)
    assert figures["allowed"] == 4
    assert len(figures["examples"]) == 3


def test_effects_of_a_fault_end_with_the_next() -> None:
    again = dataclasses.replace(KILL, struck_s=40.0)
    late = reply(begun_s=41.0, ended_s=44.0, first_s=2.0, pauses=((42.0, 43.5),), error="UNAVAILABLE/")
    first = effects([reply(pauses=((20.5, 21.0),)), late], [KILL, again], 0)
    assert first == {"longest_pause_s": 0.5, "slowest_first_token_s": 0.0, "ended": 1, "errors": {}}
    second = effects([reply(), late], [KILL, again], 1)
    assert second == {
        "longest_pause_s": 1.5,
        "slowest_first_token_s": 2.0,
        "ended": 1,
        "errors": {"UNAVAILABLE/": 1},
    }


PLANNED = {"fake": ["replica killed", "router killed"]}


def noted(**changes: Any) -> Notes:
    notes = Notes()
    for kind in PLANNED["fake"]:
        fault: dict[str, Any] = {"kind": kind, "failure": "", "recovery_s": 5.0, "longest_pause_s": 1.0}
        notes.add(faults_of("fake"), **fault)
    figures: dict[str, Any] = {
        **answers([reply()] * 10, [KILL]),
        "not_reference": 0,
        "idle_s": 1.0,
        "left": [],
        "processes": 9,
    }
    notes.add("fake", **(figures | changes))
    return notes


def missed(notes: Notes) -> set[str]:
    return {bar.bar for bar in judge(notes, ["fake"], PLANNED) if not bar.ok}


def test_a_good_run_meets_every_bar() -> None:
    assert missed(noted()) == set()
    assert judge_terminals(noted().runs).ok


def test_what_did_not_run_meets_no_bar() -> None:
    assert not any(bar.ok for bar in judge(Notes(), ["fake"], PLANNED))


@pytest.mark.parametrize(
    ("changes", "bar"),
    [
        ({"wrong": 1}, "fake: answers wrong"),
        ({"repeated": 1}, "fake: answers with repeated pieces"),
        ({"lost": 1}, "fake: answers lost"),
        ({"hung": 1}, "fake: answers hung"),
        ({"allowed": 6}, "fake: share of requests whose deadlines allowed for the faults"),
        ({"not_reference": 1}, "fake: undisturbed answers that are not the known ones"),
        ({"left": ["ray::ServeReplica (7)"]}, "fake: processes left behind"),
        ({"left": None}, "fake: processes left behind"),
    ],
)
def test_one_thing_that_is_not_misses_its_bar(changes: dict[str, Any], bar: str) -> None:
    assert missed(noted(**changes)) == {bar}


def test_faults_that_did_not_strike_or_were_never_recovered_from_miss_theirs() -> None:
    notes = noted()
    notes.runs[0]["failure"] = "no replica is ready"
    assert missed(notes) == {"fake: faults that struck", "fake: kinds of faults that struck"}
    notes = noted()
    notes.runs[1]["recovery_s"] = None
    assert missed(notes) == {"fake: faults after which capacity did not come back"}


def test_what_routers_have_left_is_a_terminal_that_is_missing() -> None:
    assert not judge_terminals(noted(idle_s=None).runs).ok
