"""Rigs of telemetry that ask real back ends: what is asked, what a whole trace is, when a bar is met, and pictures."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from octavo.names import Span as Name

from load_tests.notes import Notes
from load_tests.panel_chart import Chart, Line, draw, shown
from load_tests.phoenix import Span
from load_tests.prometheus import WINDOW, panel_questions, rule_questions
from load_tests.rigs import telemetry_backend, telemetry_queries
from load_tests.rigs.bar_command import Judge


def whole(attempts: int = 1) -> list[Span]:
    root = Span(Name.SESSION_REQUEST, "root", "client", {})
    below = [Span(name, name, "root", {}) for name in telemetry_backend.ONCE[1:]]
    for attempt in range(attempts):
        for name in telemetry_backend.EACH_ATTEMPT:
            below.append(Span(name, f"{name} {attempt}", "root", {}))
    return [root, *below]


def test_every_question_is_one_that_prometheus_understands() -> None:
    questions = [*panel_questions(), *rule_questions()]
    assert {each.where for each in questions} == {"overview", "router", "engine", "scaling", "tenants", "alerts"}
    assert not any("$" in each.expression for each in questions)
    assert any(f"[{WINDOW}]" in each.expression for each in questions)


@pytest.mark.parametrize("judge", [telemetry_queries.judge, telemetry_backend.judge])
def test_what_was_not_measured_meets_no_bar(judge: Judge) -> None:
    assert not any(bar.ok for bar in judge(Notes()))


def test_a_query_without_data_misses_its_bar_and_is_named() -> None:
    notes = Notes()
    notes.add("queries", panels=73, rules=12, empty_panels=["engine: Step time: x"], empty_rules=[], missing_metrics=[])
    panels, rules, metrics = telemetry_queries.judge(notes)
    assert (panels.ok, rules.ok, metrics.ok) == (False, True, True)
    assert panels.detail == "engine: Step time: x"


class Answering:
    """A Prometheus that has data for what it is told of."""

    def __init__(self) -> None:
        self.known: set[str] = set()
        self.asked: list[str] = []

    def ask(self, expression: str) -> list[str]:
        self.asked.append(expression)
        return ["data"] if expression in self.known else []

    def names(self) -> set[str]:
        return self.known


def test_a_survey_asks_again_for_what_had_no_answer() -> None:
    prometheus = Answering()
    survey = telemetry_queries.Survey(prometheus)
    questions = {each.expression for each in (*survey.panels, *survey.rules)}
    late = survey.panels[0].expression
    prometheus.known = (questions | survey.series) - {late}
    assert not survey.ask()
    assert {each.expression for each in survey.panels} == {late}
    assert (survey.rules, survey.series) == ([], set())
    prometheus.asked.clear()
    prometheus.known = {late}
    assert survey.ask()
    assert set(prometheus.asked) == {late}


def test_a_survey_of_nothing_leaves_all_unanswered() -> None:
    survey = telemetry_queries.Survey(Answering())
    assert not survey.ask()
    assert len(survey.panels) > 50
    assert "octavo_queue_requests" in survey.series
    assert "vllm:num_requests_waiting" in survey.series


@pytest.mark.parametrize("attempts", [1, 2])
def test_a_whole_trace_lacks_nothing(attempts: int) -> None:
    assert telemetry_backend.faults(whole(attempts)) == ""


@pytest.mark.parametrize("missing", [Name.SESSION_REQUEST, Name.DECODE, Name.DELIVER])
def test_a_trace_that_lacks_a_span_is_noticed(missing: str) -> None:
    trace = [span for span in whole() if span.name != missing]
    assert missing in telemetry_backend.faults(trace) or "without parent" in telemetry_backend.faults(trace)


def test_a_trace_with_two_roots_is_noticed() -> None:
    trace = [*whole(), Span(Name.SESSION_REQUEST, "again", "client", {})]
    assert telemetry_backend.faults(trace) == Name.SESSION_REQUEST


def test_a_picture_has_a_line_for_each_series() -> None:
    lines = [Line("<p50>", [(0.0, 1.0), (1.0, 2.0)]), Line("p99", [(0.0, 4.0), (1.0, 3.0)]), Line("none", [])]
    picture = draw("A & B", [Chart("First token", "s", lines), Chart("Empty", "short", [])])
    tree = ET.fromstring(picture)
    drawn = [each for each in tree.iter() if each.tag.endswith("polyline")]
    assert len(drawn) == 2
    texts = [each.text for each in tree.iter() if each.tag.endswith("text")]
    assert {"A & B", "<p50>", "p99", "4 s", "First token", "Empty"} <= set(texts)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0123, "s", "12.3 ms"),
        (2.5, "s", "2.5 s"),
        (0.5, "percentunit", "50 %"),
        (1500, "ops", "1.5 k"),
        (7, "none", "7"),
    ],
)
def test_values_are_short(value: float, unit: str, text: str) -> None:
    assert shown(value, unit) == text
