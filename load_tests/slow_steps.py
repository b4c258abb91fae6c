"""A step that is told to take longer, and who was held up by it: spans of requests and of steps must say the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from octavo.names import Attribute, Event
from octavo.names import Span as SpanName

from load_tests.span_collector import Span
from load_tests.trace_trees import Tree

COMPUTED = (SpanName.PREFILL, SpanName.DECODE)
"""In this order."""
MOST = 0.8
"""So much of a slow step at least lies within what its members tell of themselves: spans of one phase end where the
next begins, in the middle of a step."""


async def hold_up(stall_file: Path, stall_s: float) -> int:
    """Have the next step of one replica take longer, by its `engine.stall_file`; return when that had begun, in
    nanoseconds since 1970."""
    fresh = stall_file.with_suffix(".new")
    await asyncio.to_thread(fresh.write_text, f"{stall_s:g}")
    await asyncio.to_thread(fresh.rename, stall_file)
    while await asyncio.to_thread(stall_file.exists):  # noqa: ASYNC110  another process removes it
        await asyncio.sleep(0.005)
    return time.time_ns()


def slow_steps(spans: Iterable[Span], least_s: float, at_ns: int) -> list[Span]:
    """Return the steps that took at least so long and were under way then. (A machine that does other things, too, may
    have slow ones of its own.)"""
    return [
        span
        for span in spans
        if span.name == SpanName.STEP
        and span.attributes[Attribute.STEP_DURATION] >= least_s
        and span.start_ns <= at_ns <= span.end_ns
    ]


def members(step: Span, trees: Iterable[Tree]) -> set[str]:
    """Return the traces of those that the step is linked to."""
    return {tree.server.trace_id for tree in trees if tree.parts[SpanName.DISPATCH].span_id in step.links}


def wrongly_told(step: Span, trees: Sequence[Tree]) -> set[str]:
    """Return the traces of which spans and links say different things.

    Who is linked names this step as the slowest of its prefill or decode, or one that was slower still, and was being
    computed for most of the step's time. Who is not linked neither names it nor was decoding then: a prompt may wait
    for the next step while others are computed, an answer takes part in each.
    """
    number, duration_s = step.attributes[Attribute.STEP], step.attributes[Attribute.STEP_DURATION]
    linked, found = members(step, trees), set()
    for tree in trees:
        trace_id, parts = tree.server.trace_id, [tree.parts[name] for name in COMPUTED]
        is_here = parts[0].attributes[Attribute.REPLICA] == step.attributes[Attribute.REPLICA]
        told = [event.attributes for part in parts for event in part.events if event.name == Event.SLOWEST_STEP]
        names_it = is_here and any(about[Attribute.STEP] == number for about in told)
        names_slower = any(about[Attribute.STEP_DURATION] >= duration_s for about in told)
        if trace_id in linked:
            is_right = is_here and (names_it or names_slower) and _overlap(step, parts) >= MOST
        else:
            is_right = not names_it and not (is_here and _overlap(step, parts[1:]) >= MOST)
        if not is_right:
            found.add(trace_id)
    return found


def _overlap(step: Span, parts: Iterable[Span]) -> float:
    """Return the share of the step's time that lies in these."""
    overlap = sum(max(0, min(part.end_ns, step.end_ns) - max(part.start_ns, step.start_ns)) for part in parts)
    return overlap / (step.end_ns - step.start_ns)
