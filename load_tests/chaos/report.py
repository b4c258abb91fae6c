"""From what happened in a run of chaos to figures and bars. Pure.

Notes: one run called after its family, and one run `faults_of(family)` for each fault. Bars are judged by them alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from load_tests.bars import Bar, at_least, at_most
from load_tests.chaos.verdict import BAD, EXCUSED, RIGHT, Reply, Struck, is_allowed, longest_pause_s, verdict
from load_tests.notes import Notes, figure

MAX_NAMED = 8
MIN_STRUCK = 0.75
"""Share of the planned faults: one that is due while capacity is not back waits, and is left out if the next is due."""
MIN_ALLOWED = 0.7
"""Share of the requests whose deadlines allowed for the faults: of the others little is asked."""
WORDS = {"wrong": "wrong", "repeated": "with repeated pieces", "lost": "lost", "hung": "hung"}


def faults_of(family: str) -> str:
    return f"{family}, fault"


def answers(replies: Sequence[Reply], faults: Sequence[Struck]) -> dict[str, Any]:
    """Return the figures of all requests of a run."""
    verdicts = [verdict(reply, faults) for reply in replies]
    counts = Counter(verdicts)
    bad = [
        f"{found}: {reply.name}, begun at {reply.begun_s:.1f} s {reply.error}".rstrip()
        for found, reply in zip(verdicts, replies, strict=True)
        if found in BAD
    ]
    return {
        "sent": len(replies),
        "ended": sum(reply.ended_s is not None for reply in replies),
        RIGHT: counts[RIGHT],
        EXCUSED: counts[EXCUSED],
        **{word: counts[word] for word in BAD},
        "allowed": sum(is_allowed(reply, faults) for reply in replies),
        "errors": dict(Counter(reply.error for reply in replies if reply.error)),
        "examples": bad[:MAX_NAMED],
    }


def effects(replies: Sequence[Reply], faults: Sequence[Struck], number: int) -> dict[str, Any]:
    """Return what clients felt of one fault: until the next one struck."""
    begin_s = faults[number].struck_s
    end_s = faults[number + 1].struck_s if number + 1 < len(faults) else math.inf
    ended = [reply for reply in replies if reply.ended_s is not None and begin_s <= reply.ended_s < end_s]
    begun = [reply.first_s for reply in replies if begin_s <= reply.begun_s < end_s and reply.first_s is not None]
    return {
        "longest_pause_s": round(longest_pause_s(replies, begin_s, end_s), 3),
        "slowest_first_token_s": round(max(begun, default=0.0), 3),
        "ended": len(ended),
        "errors": dict(Counter(reply.error for reply in ended if reply.error)),
    }


def judge(notes: Notes, families: Sequence[str], planned: Mapping[str, Sequence[str]]) -> list[Bar]:
    """Return the bars of `families`; `planned`: of each the kinds of its faults, one for each fault."""
    return [bar for family in families for bar in _judge(notes, family, planned[family])]


def _judge(notes: Notes, family: str, planned: Sequence[str]) -> list[Bar]:
    sent, allowed = notes.total(family, "sent"), notes.total(family, "allowed")
    examples = [each for run in notes.of(family, "examples") for each in run]
    bars = [
        at_most(f"{family}: answers {WORDS[word]}", notes.total(family, word) if sent else None, 0)
        for word in ("wrong", "repeated", "lost", "hung")
    ]
    said = f"{figure(sent)} requests, {figure(notes.total(family, EXCUSED))} excused by their deadlines"
    bars[0] = at_most(bars[0].bar, bars[0].value, 0, "; ".join([said, *examples]))
    share = None if not sent or allowed is None else allowed / sent
    return [
        *bars,
        at_least(f"{family}: share of requests whose deadlines allowed for the faults", share, MIN_ALLOWED),
        *_judge_faults(notes, family, planned),
        at_most(f"{family}: undisturbed answers that are not the known ones", notes.total(family, "not_reference"), 0),
        _judge_left(notes, family),
    ]


def _judge_faults(notes: Notes, family: str, planned: Sequence[str]) -> list[Bar]:
    struck = [run for run in notes.runs if run["what"] == faults_of(family) and not run["failure"]]
    failed = [run for run in notes.runs if run["what"] == faults_of(family) and run["failure"]]
    never = [run["kind"] for run in struck if run["recovery_s"] is None]
    slowest = max((run["recovery_s"] for run in struck if run["recovery_s"] is not None), default=None)
    pause = max((run["longest_pause_s"] for run in struck), default=None)
    counts = Counter(run["kind"] for run in struck)
    detail = ", ".join(f"{count} × {kind}" for kind, count in sorted(counts.items()))
    said = "; ".join(f"{run['kind']}: {run['failure']}" for run in failed[:MAX_NAMED])
    felt = f"slowest {figure(slowest, 's')}, longest pause of a stream {figure(pause, 's')}"
    return [
        at_least(f"{family}: faults that struck", len(struck), math.ceil(MIN_STRUCK * len(planned)), detail),
        at_least(f"{family}: kinds of faults that struck", len(counts), len(set(planned)), said),
        at_most(
            f"{family}: faults after which capacity did not come back",
            len(never) if struck else None,
            0,
            "; ".join([felt, *never]),
        ),
    ]


def _judge_left(notes: Notes, family: str) -> Bar:
    left = [each for run in notes.of(family, "left") for each in run]
    return at_most(
        f"{family}: processes left behind",
        len(left) if notes.of(family, "left") else None,
        0,
        f"of {figure(notes.total(family, 'processes'))}; {', '.join(left[:MAX_NAMED])}".rstrip("; "),
    )
