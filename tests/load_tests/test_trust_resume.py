"""Answers whose replica dies in their middle: what is asked, how what comes is compared, and when a bar is met."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from typing import Any

import pytest
from octavo.client import Delta, Finish, FinishReason

from load_tests.bars import Bar
from load_tests.notes import Notes
from load_tests.rigs import trust_resume
from load_tests.rigs.resume_asks import CALLS, KINDS, Ask, fake_asks, middle, oracle_asks, until_stop, with_stops
from load_tests.rigs.resume_stream import Answer, Stream, compared
from load_tests.rigs.trust_resume import (
    AGAIN,
    ANSWERS,
    FAULTS,
    GAPS,
    LENGTHS,
    ORACLE,
    REQUESTS,
    judge,
    percentile,
    stopped,
)
from load_tests.server import ServerError

LENGTH = Finish(FinishReason.LENGTH)


def delta(text: str, *token_ids: int, offset: int, finish: Finish | None = None) -> Delta:
    return Delta(text, token_ids, token_offset=offset, finish=finish)


def make_ask(kind: str = "greedy", stop: str = "") -> Ask:
    return Ask(name="one", kind=kind, call="session", prompt=(1, 2), options={}, stop=stop)


def begun(stop: str = "") -> Stream:
    """A stream with two of its four tokens."""
    stream = Stream(make_ask(stop=stop))
    stream.is_begun = True
    stream.took(delta("a", 5, offset=0), 10.0)
    stream.took(delta("b", 6, offset=1), 10.5)
    return stream


def ended(attempts: int = 1) -> Stream:
    stream = begun()
    stream.took(delta("cd", 7, 8, offset=2, finish=LENGTH), 12.0)
    stream.is_ended = True
    stream.attempts = attempts
    return stream


EXPECTED = Answer((5, 6, 7, 8), "abcd", LENGTH)


def test_an_answer_has_every_piece_in_its_place_and_a_largest_gap() -> None:
    stream = ended()
    assert (stream.answer, stream.num_misplaced, stream.largest_gap_s) == (EXPECTED, 0, 1.5)
    assert stream.differs(EXPECTED) == ""


def test_text_without_tokens_makes_no_gap() -> None:
    stream = begun()
    stream.took(delta("!", offset=2), 99.0)
    assert (stream.text, stream.largest_gap_s) == ("ab!", 0.5)


def test_what_came_instead_has_a_name() -> None:
    lost, failed, repeated, misplaced, late, other = begun(), ended(), begun(), ended(), ended(), ended()
    lost.is_ended = True
    failed.error = "UNAVAILABLE"
    for token in (7, 8, 9):
        repeated.took(delta("", token, offset=len(repeated.token_ids)), 11.0)
    repeated.is_ended = True
    misplaced.num_misplaced = 1
    late.took(delta("d", 8, offset=4), 13.0)
    other.text = "abce"
    streams = [lost, failed, begun(), repeated, misplaced, late, other, ended()]
    found = [stream.differs(EXPECTED) for stream in streams]
    assert found == ["lost", "lost", "lost", "repeated", "repeated", "repeated", "different", ""]
    figures = compared(streams, [EXPECTED] * len(streams))
    assert (figures["sent"], figures["ended"], figures["identical"], figures["wrong"]) == (8, 7, 1, 7)
    assert figures["wrongs"] == {"lost": 3, "repeated": 3, "different": 1}
    assert figures["examples"][1] == "lost: one UNAVAILABLE"


def test_cut_is_what_had_tokens_and_went_on_elsewhere() -> None:
    cut, stayed, early = ended(attempts=2), ended(), ended(attempts=2)
    cut.set_mark()
    stayed.set_mark()
    figures = compared([cut, stayed, early], [EXPECTED] * 3)
    assert (figures["cut"], figures["cut_in_stop"], figures["gaps_s"]) == (1, 0, [1.5])
    assert (figures["cut_kinds"], figures["cut_calls"]) == ({"greedy": 1}, {"session": 1})


@pytest.mark.parametrize(("held_back", "is_in_stop"), [(True, True), (False, False)])
def test_a_cut_in_a_stop_string_is_one_after_all_text(held_back: bool, is_in_stop: bool) -> None:
    stream = begun(stop="cdef")
    stream.set_mark()
    stream.took(delta("" if held_back else "x", 7, offset=2, finish=Finish(FinishReason.STOP, stop="cdef")), 11.0)
    stream.is_ended, stream.attempts = True, 2
    assert stream.is_cut
    assert stream.is_cut_in_stop == is_in_stop


def test_all_kinds_are_asked_over_both_calls_with_and_without_stop_strings() -> None:
    entries = json.loads(ORACLE.read_text())
    asks = oracle_asks(entries, REQUESTS, LENGTHS)
    asks = with_stops(asks, ["what answers this is a text"] * len(asks))
    found = {(ask.kind, ask.call, bool(ask.stop)) for ask in asks}
    assert found == {(kind, call, stops) for kind in KINDS for call in CALLS for stops in (True, False)}
    assert {ask.prompt for ask in asks} == {tuple(entry["prompt"]) for entry in entries}
    for ask in asks:
        assert LENGTHS[0] <= ask.options["max_tokens"] <= LENGTHS[1]
        assert ("stop" in ask.options) == bool(ask.stop)
        if ask.kind == "greedy":
            assert ask.reference is not None
            assert len(ask.reference) == ask.options["max_tokens"]


def test_a_stop_string_is_the_middle_of_an_answer() -> None:
    assert middle("aaabbbccc") == "bbb"
    assert middle("ab") == ""
    assert len(middle("é" * 900).encode()) <= 256
    assert until_stop("aaabbbccc", "bbb") == "aaa"
    assert until_stop("aaabbbccc", "") == "aaabbbccc"
    asks = with_stops([make_ask()] * 10, ["aaabbbccc"] * 9 + [""])
    assert [ask.stop for ask in asks] == ["", "", "", "", "bbb", "", "", "", "", ""]


def test_what_a_stop_string_leaves_of_an_answer() -> None:
    whole = Answer((5, 6, 7, 8), "abcd", LENGTH)
    assert stopped(make_ask(), whole, whole) is whole
    stop = Finish(FinishReason.STOP, stop="bc")
    left = stopped(make_ask(stop="bc"), whole, Answer((5, 6, 7), "whatever", LENGTH))
    assert left == Answer((5, 6, 7), "a", stop)


def test_fake_answers_are_known_and_asked_for_once() -> None:
    asks = fake_asks(6, 9, random.Random(1))
    assert all(ask.reference is not None and len(ask.reference) == 9 for ask in asks)
    assert len({ask.prompt for ask in asks}) == 6
    assert {ask.call for ask in asks} == set(CALLS)


def test_percentiles_are_values_that_were_seen() -> None:
    assert percentile([], 0.99) is None
    assert percentile([3.0], 0.99) == 3.0
    assert percentile(list(range(1, 101)), 0.99) == 99
    assert percentile([1.0, 2.0], 0.5) == 1.0


def good() -> dict[str, dict[str, Any]]:
    """Figures of each run that meet every bar."""
    whole = {"sent": REQUESTS, "ended": REQUESTS, "wrong": 0, "wrongs": {}, "examples": []}
    runs: dict[str, dict[str, Any]] = {ANSWERS: {**whole, "not_reference": 0}, AGAIN: dict(whole)}
    for what in FAULTS:
        runs[what] = {**whole, "cut": 12, "cut_in_stop": 1, "cut_kinds": dict.fromkeys(KINDS, 3)}
    for what in GAPS:
        runs[what] = {**whole, "gaps_s": [0.3] * 30}
    runs["SIGSTOP"]["running_at_thaw"] = runs["gap, SIGSTOP"]["running_at_thaw"] = 5
    return runs


def judged(runs: dict[str, dict[str, Any]]) -> dict[str, Bar]:
    bars = judge(Notes({"what": what, **figures} for what, figures in runs.items()))
    assert len({bar.bar for bar in bars}) == len(bars)
    return {bar.bar: bar for bar in bars}


def test_what_was_not_measured_meets_no_bar() -> None:
    bars = judge(Notes())
    assert bars
    assert not any(bar.ok for bar in bars)


def test_what_is_as_it_should_be_meets_every_bar() -> None:
    assert [bar.bar for bar in judged(good()).values() if not bar.ok] == []


@pytest.mark.parametrize(
    ("what", "figures", "missed"),
    [
        (ANSWERS, {"not_reference": 1}, {"resume: greedy answers that are not the reference's"}),
        ("drain", {"sent": 199}, {"resume: requests of the real model in each run"}),
        ("drain", {"wrong": 1}, {"resume, drain: other answers"}),
        (
            "SIGSTOP",
            {"wrong": 1},
            {"resume, SIGSTOP: other answers", "resume: answers that a thawed replica's late tokens changed"},
        ),
        ("SIGSTOP", {"running_at_thaw": 0}, {"resume: answers that a thawed replica's late tokens changed"}),
        ("kill -9", {"cut": 7}, {"resume, kill -9: answers cut in their middle"}),
        ("gap, kill -9", {"gaps_s": [0.3] * 9 + [2.1]}, {"resume: p99 gap of a dead replica's streams, s"}),
        ("gap, SIGSTOP", {"gaps_s": [4.2] * 9 + [5.1]}, {"resume: p99 gap of a silent replica's streams, s"}),
        ("gap, SIGSTOP", {"gaps_s": []}, {"resume: p99 gap of a silent replica's streams, s"}),
    ],
)
def test_what_is_not_misses_its_bar(what: str, figures: dict[str, Any], missed: set[str]) -> None:
    runs = good()
    runs[what] |= figures
    assert {bar.bar for bar in judged(runs).values() if not bar.ok} == missed


def test_a_kind_that_was_never_cut_misses_a_bar() -> None:
    runs = good()
    for what in FAULTS:
        runs[what]["cut_in_stop"] = 0
    assert not judged(runs)["resume: kinds of answers that were cut"].ok


class NeverReady:
    """A server that starts for ever, as when a model is fetched; `stop` ends it."""

    def __init__(self, *_: object) -> None:
        self._is_over = threading.Event()

    def await_line(self, start: str, timeout_s: float) -> str:
        self._is_over.wait(5.0)
        raise ServerError("it has ended")

    def stop(self) -> None:
        self._is_over.set()


async def test_who_is_told_to_end_does_not_wait_for_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop stood still until the cluster was ready. The bench ends a rig that does not stop in time, and then
    nobody ended its cluster."""
    monkeypatch.setattr(trust_resume, "ServerProcess", NeverReady)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1), trust_resume.serving((), {}):
            pass
