"""The judges of traces see what is wrong with them; spans are made up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from octavo.names import Attribute, Event
from octavo.names import Span as SpanName

from load_tests import slow_steps
from load_tests.span_collector import Event as SpanEvent
from load_tests.span_collector import Span
from load_tests.trace_trees import (
    BELOW_DISPATCH,
    Answer,
    Tree,
    miscounted,
    trees_of,
    unlinked_batches,
    unlinked_steps,
)

STEPS = {Attribute.NUM_STEPS: 2, Attribute.FIRST_STEP: 2, Attribute.LAST_STEP: 3}
TIMES = {
    SpanName.SESSION_REQUEST: (0, 100),
    SpanName.ACCEPT: (0, 10),
    SpanName.QUEUE: (10, 20),
    SpanName.DISPATCH: (20, 90),
    SpanName.DELIVER: (90, 100),
    SpanName.ENGINE_QUEUE: (30, 40),
    SpanName.PREFILL: (40, 50),
    SpanName.DECODE: (50, 80),
}
ABOUT: dict[str, dict[str, Any]] = {
    SpanName.SESSION_REQUEST: {
        Attribute.INPUT_TOKENS: 5,
        Attribute.CACHED_INPUT_TOKENS: 1,
        Attribute.OUTPUT_TOKENS: 3,
    },
    SpanName.DISPATCH: {Attribute.BATCH_ID: 4},
    SpanName.PREFILL: {
        Attribute.INPUT_TOKENS: 5,
        Attribute.CACHED_INPUT_TOKENS: 1,
        Attribute.NUM_STEPS: 1,
        Attribute.FIRST_STEP: 1,
        Attribute.LAST_STEP: 1,
        Attribute.REPLICA: "r",
    },
    SpanName.DECODE: {Attribute.OUTPUT_TOKENS: 3, **STEPS, Attribute.REPLICA: "r"},
}


def answer(trace: str = "a") -> Answer:
    return Answer(trace, "client", num_prompt=5, num_cached=1, num_generated=3)


def spans_of(trace: str = "a") -> list[Span]:
    parents = {SpanName.SESSION_REQUEST: "client", **dict.fromkeys(BELOW_DISPATCH, f"{trace} {SpanName.DISPATCH}")}
    return [
        Span(
            service="octavo",
            name=name,
            trace_id=trace,
            span_id=f"{trace} {name}",
            parent_id=parents.get(name, f"{trace} {SpanName.SESSION_REQUEST}"),
            start_ns=start,
            end_ns=end,
            attributes=ABOUT.get(name, {}),
            links=(),
        )
        for name, (start, end) in TIMES.items()
    ]


def shared(name: str, members: str, times: tuple[int, int] = (0, 1), **about: Any) -> Span:
    """Return a batch or step of requests called by one letter each."""
    links = tuple(f"{member} {SpanName.DISPATCH}" for member in members)
    return Span("octavo", name, "own", f"{name} {members}", "", *times, attributes=about, links=links)


def batch(members: str, number: int = 4, size: int | None = None) -> Span:
    about = {Attribute.BATCH_ID: number, Attribute.BATCH_REQUESTS: len(members) if size is None else size}
    return shared(SpanName.BATCH, members, **about)


def step(number: int, members: str, times: tuple[int, int] = (0, 1), size: int | None = None) -> Span:
    about = {
        Attribute.STEP: number,
        Attribute.STEP_SEQUENCES: len(members) if size is None else size,
        Attribute.STEP_DURATION: (times[1] - times[0]) / 1e9,
        Attribute.REPLICA: "r",
    }
    return shared(SpanName.STEP, members, times, **about)


def tree(trace: str = "a") -> Tree:
    trees, wrong = trees_of([answer(trace)], spans_of(trace))
    assert wrong == []
    return trees[trace]


def test_a_whole_tree_is_found_and_what_it_covers() -> None:
    found = tree()
    assert found.coverage() == 1.0
    assert found.leaf_coverage == 0.8
    late = replace(found, parts={**found.parts, SpanName.QUEUE: replace(found.parts[SpanName.QUEUE], start_ns=15)})
    assert late.coverage() == 0.95
    beyond = replace(found.parts[SpanName.DELIVER], end_ns=500)
    assert replace(found, parts={**found.parts, SpanName.DELIVER: beyond}).coverage() == 1.0


@pytest.mark.parametrize("name", TIMES)
def test_what_is_missing_or_there_twice_is_no_tree(name: str) -> None:
    spans = spans_of()
    without = [span for span in spans if span.name != name]
    twice = [*spans, *(span for span in spans if span.name == name)]
    for some in (without, twice):
        trees, wrong = trees_of([answer()], some)
        assert trees == {}
        assert len(wrong) == 1


def test_a_span_in_the_wrong_place_is_no_tree() -> None:
    spans = [replace(s, parent_id="a octavo.queue") if s.name == SpanName.DECODE else s for s in spans_of()]
    assert trees_of([answer()], spans)[1] == ["a: octavo.decode is not below octavo.dispatch"]
    unknown = replace(spans[0], name="what?", parent_id="x")
    assert trees_of([answer()], [*spans_of(), unknown])[1] == ["a: spans that nobody knows: ['what?']"]


@pytest.mark.parametrize("wrong", [{"num_prompt": 6}, {"num_cached": 0}, {"num_generated": 4}])
def test_other_counts_than_the_usage_s_are_seen(wrong: dict[str, int]) -> None:
    assert list(miscounted(answer(), tree())) == []
    assert len(list(miscounted(replace(answer(), **wrong), tree()))) == 2


def test_batches_have_all_their_members_once() -> None:
    trees = [tree("a"), tree("b")]
    assert unlinked_batches(trees, [batch("ab")]) == []
    assert unlinked_batches(trees, [batch("a", size=2)])
    assert unlinked_batches(trees, [batch("a")]), "b is in none"
    assert unlinked_batches(trees, [batch("ab"), batch("b")]), "b is in two"
    assert unlinked_batches(trees, [batch("ab", number=5)]), "they say another number"
    assert unlinked_batches(trees, [batch("abc")]), "nobody knows c"


def test_steps_have_all_their_members_and_members_all_their_steps() -> None:
    trees = [tree("a"), tree("b")]
    steps = [step(1, "ab"), step(2, "ab"), step(3, "ab")]
    assert unlinked_steps(trees, steps) == []
    assert unlinked_steps(trees, [step(1, "ab"), step(2, "ab", size=3), step(3, "ab")])
    assert unlinked_steps(trees, [step(1, "ab"), step(2, "a"), step(3, "ab")])
    assert unlinked_steps(trees, [*steps[:2], step(4, "ab")])
    assert unlinked_steps(trees, steps[:2])


def slow_tree(trace: str, named: int) -> Tree:
    """Return a tree whose decode says that step `named` was its slowest."""
    found = tree(trace)
    event = SpanEvent(Event.SLOWEST_STEP, 0, {Attribute.STEP: named, Attribute.STEP_DURATION: 1.0})
    return replace(
        found, parts={**found.parts, SpanName.DECODE: replace(found.parts[SpanName.DECODE], events=(event,))}
    )


def replace_duration(step: Span, duration_s: float) -> Span:
    return replace(step, attributes={**step.attributes, Attribute.STEP_DURATION: duration_s})


def test_a_slow_step_is_told_by_links_events_and_times_alike() -> None:
    slow = step(3, "a", (55, 75))
    early = slow_tree("b", 2)
    moved = {name: replace(span, start_ns=0, end_ns=20) for name, span in early.parts.items()}
    other = replace(early, parts=moved)
    trees = [slow_tree("a", 3), other]
    assert slow_steps.slow_steps([slow, step(2, "b", (0, 5)), step(4, "b", (75, 95))], 2e-8, 60) == [slow]
    assert slow_steps.members(slow, trees) == {"a"}
    assert slow_steps.wrongly_told(slow, trees) == set()
    assert slow_steps.wrongly_told(step(3, "ab", (55, 75)), trees) == {"b"}, "linked, and shows nothing"
    assert slow_steps.wrongly_told(step(3, "", (55, 75)), trees) == {"a"}, "shows it, and is not linked"
    assert slow_steps.wrongly_told(replace_duration(slow, 2.0), [slow_tree("a", 2), other]) == {"a"}, (
        "names a faster one"
    )
    assert slow_steps.wrongly_told(slow, [slow_tree("a", 2), other]) == set(), "names one that was slower still"
    assert slow_steps.wrongly_told(slow, [trees[0], early]) == {"b"}, "was computed all the time"
