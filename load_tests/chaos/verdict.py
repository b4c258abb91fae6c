"""What is to be said of an answer that was asked for while faults struck. Pure.

    right       all of it, once, and in its place
    excused     it ended with an error that a deadline explains, and its deadline did not allow for the faults
    wrong       other tokens, other text or another finish than undisturbed
    repeated    a piece that had come, or that did not begin where the answer was
    lost        an error although the deadline allowed for the faults, an error that no deadline explains, or too little
    hung        no end at all, when its deadline had long passed

A deadline allows for the faults if it is longer than the recovery times of all faults that fell into the request's life
together, `MARGIN` times what the answer takes undisturbed, and `SLACK_S`. Who brings no deadline is always allowed for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from load_tests.rigs.resume_stream import Answer, Stream

RIGHT, EXCUSED = "right", "excused"
BAD = ("wrong", "repeated", "lost", "hung")
MARGIN, SLACK_S = 3.0, 10.0
AFTERMATH_S = 10.0
"""For so long after capacity is back a fault still counts: clients connect again, queues empty."""
EXPLAINED = frozenset({"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})
"""Codes of what has no time left: it passed, it cannot be met, or there is none for another try."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """A fault that happened; times are seconds since the load began. `recovery_s`: from the strike until capacity was
    back; None if it never was."""

    kind: str
    struck_s: float
    recovery_s: float | None

    @property
    def over_s(self) -> float:
        """When nothing is felt of it any more."""
        return math.inf if self.recovery_s is None else self.struck_s + self.recovery_s + AFTERMATH_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A request that is over; times as for faults."""

    name: str
    content: str
    """"whole", "part" (right as far as it goes), "wrong" or "repeated"."""
    error: str
    """CODE/REASON, empty if it ended well."""
    begun_s: float
    ended_s: float | None
    """None: it never did."""
    timeout_s: float | None
    usual_s: float
    """What this answer takes undisturbed."""
    first_s: float | None
    """From its begin to its first token."""
    pauses: tuple[tuple[float, float], ...] = ()
    """From when to when its client waited for its next token, where that was long."""


def content(stream: Stream, expected: Answer) -> str:
    """Say what there is of an answer that should be `expected`."""
    if stream.num_misplaced or len(stream.token_ids) > len(expected.token_ids):
        return "repeated"
    is_beginning = tuple(stream.token_ids) == expected.token_ids[: len(stream.token_ids)]
    if not is_beginning or not expected.text.startswith(stream.text):
        return "wrong"
    if stream.answer == expected:
        return "whole"
    is_all = len(stream.token_ids) == len(expected.token_ids) and stream.finish is not None
    return "wrong" if is_all else "part"


def is_allowed(reply: Reply, faults: Iterable[Struck]) -> bool:
    """Say whether the deadline of `reply` allows for the faults of its life."""
    if reply.timeout_s is None:
        return True
    until = reply.begun_s + reply.timeout_s if reply.ended_s is None else reply.ended_s
    needed = MARGIN * reply.usual_s + SLACK_S
    for fault in faults:
        if fault.struck_s < until and reply.begun_s < fault.over_s:
            needed += math.inf if fault.recovery_s is None else fault.recovery_s
    return reply.timeout_s > needed


def verdict(reply: Reply, faults: Iterable[Struck]) -> str:
    """Return one of the words above."""
    if reply.content in ("wrong", "repeated"):
        return reply.content
    if reply.ended_s is None:
        return "hung"
    if not reply.error:
        return RIGHT if reply.content == "whole" else "lost"
    is_explained = reply.error.partition("/")[0] in EXPLAINED
    return EXCUSED if is_explained and not is_allowed(reply, faults) else "lost"


def longest_pause_s(replies: Sequence[Reply], begin_s: float, end_s: float) -> float:
    """Return the longest wait for a next token that was under way between the two times."""
    pauses = (pause for reply in replies for pause in reply.pauses)
    return max((to - since for since, to in pauses if since < end_s and to > begin_s), default=0.0)
