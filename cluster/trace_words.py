"""What `octavo trace` says of an attempt, whatever was asked for: its wait, where it went, why; and its lines. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from octavo.v1 import status_service_pb2 as pb
from octavo.v1 import types_pb2 as types

MIN_REST_S: Final = 0.0001
"""A smaller rest of a sum is not worth a word."""
_RULES: Final = {
    "only": "nobody else could take it",
    "prefix": "for what it has of the prompt",
    "least_loaded": "as the cheapest",
    "affinity": "by its affinity key, of those that cost the same",
}


def seconds(duration_s: float) -> str:
    """Return a duration for people."""
    if abs(duration_s) >= 100:
        return f"{duration_s:.0f} s"
    return f"{duration_s:.3f} s" if abs(duration_s) >= 1 else f"{duration_s * 1000:.1f} ms"


def line(at_s: float | None, took_s: float | None, what: str) -> str:
    """Return a line of the story: when, how long, what."""
    at, took = ("" if each is None else seconds(each) for each in (at_s, took_s))
    return f"{at:>10} {took:>10}   {what}"


def why(attempt: pb.RequestRecord.Attempt) -> str:
    """Say what a wait was for."""
    turn_s = attempt.wait_s - attempt.no_replica_s - attempt.full_s
    reasons = []
    if attempt.no_replica_s > MIN_REST_S:
        reasons.append(f"no replica was ready for {seconds(attempt.no_replica_s)}")
    if attempt.full_s > MIN_REST_S:
        reasons.append(f"nobody was free for {seconds(attempt.full_s)}")
    if turn_s > MIN_REST_S and (reasons or attempt.num_waiting):
        reasons.append(f"its turn, or its batch, came after {seconds(turn_s)}{' more' if reasons else ''}")
    if not reasons:
        reasons.append("until the end of the router's turn, as what comes together goes together")
    others = f"; {attempt.num_waiting} waited when it came, {attempt.num_gone} went before it"
    return ", ".join(reasons) + (others if attempt.num_waiting or attempt.num_gone else "")


def placed(attempt: pb.RequestRecord.Attempt) -> Iterator[str]:
    decision = attempt.decision
    placed = f"placed on {decision.replica}, {_rule(decision)} ({decision.rule}); {_batch(attempt)}"
    yield line(attempt.sent_at_s, None, placed)
    names = [candidate.replica for candidate in decision.candidates]
    width = max(map(len, names), default=0)
    for candidate in decision.candidates:
        mark = "->" if candidate.replica == decision.replica else "  "
        yield f"{'':21}   {mark} {candidate.replica:{width}}  {_cost(candidate)}"


def _rule(decision: types.Decision) -> str:
    least = min((candidate.cost for candidate in decision.candidates), default=0.0)
    num_least = sum(candidate.cost == least for candidate in decision.candidates)
    if decision.rule == "least_loaded" and num_least > 1:
        return "drawn from those that cost the least"
    return _RULES.get(decision.rule, decision.rule)


def _batch(attempt: pb.RequestRecord.Attempt) -> str:
    others = attempt.batch_requests - 1
    company = "alone" if others <= 0 else f"with {others} other{'s' if others > 1 else ''}"
    return f"in batch {attempt.batch_id} {company}, {attempt.batch_tokens} tokens"


def _cost(candidate: types.Decision.Candidate) -> str:
    terms = (
        ("of this prompt to compute", candidate.uncached_tokens),
        ("owed to others", candidate.owed_tokens),
        ("for what it decodes", candidate.decode_tokens),
        ("to forget", candidate.displaced_tokens),
        ("computed lately beyond its part", candidate.recent_tokens),
    )
    sums = " + ".join(f"{value:g} {name}" for number, (name, value) in enumerate(terms) if value or not number)
    return f"cost {candidate.cost:g} = {sums} (it has {candidate.matched_tokens})"
