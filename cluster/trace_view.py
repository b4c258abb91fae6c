"""One request's record in words, from its arrival to its last message, with the sum of its parts; and lists of records.

Plain lines, each with when it began and how long it took. Pure. What a client or an error wrote is quoted as it is:
whoever prints it sees to control characters.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from octavo.v1 import status_service_pb2 as pb
from octavo.v1 import types_pb2 as types

MIN_REST_S: Final = 0.0001
"""A smaller rest of a sum is not worth a word."""
_COLUMNS: Final = ("took", "queued", "first token", "prompt", "generated", "replicas", "ended", "model", "request")
_RULES: Final = {
    "only": "nobody else could take it",
    "prefix": "for what it has of the prompt",
    "least_loaded": "as the cheapest",
    "affinity": "by its affinity key, of those that cost the same",
}


class Part(NamedTuple):
    """A part of the whole time."""

    name: str
    duration_s: float


def explained(record: pb.RequestRecord) -> list[str]:
    """Return the lines that explain one request."""
    return [*_heading(record), "", f"{'at':>10} {'took':>10}", *_story(record), "", _sum(record)]


def listed(records: Sequence[pb.RequestRecord], *, num_kept: int, num_routers: int) -> list[str]:
    """Return a table of `records`, and of how many they are."""
    table: list[tuple[str, ...]] = [_COLUMNS]
    for record in records:
        first = seconds(record.first_token_at_s) if record.HasField("first_token_at_s") else "-"
        queued = sum(attempt.wait_s for attempt in record.attempts)
        numbers = (record.prompt_tokens, record.generated_tokens, len(record.attempts))
        end = record.reason or record.code
        words = (end, record.model or "-", record.request_id)
        table.append((seconds(record.duration_s), seconds(queued), first, *map(str, numbers), *words))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row[:6], widths[:6], strict=True)]
        cells += [cell.ljust(width) for cell, width in zip(row[6:], widths[6:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    routers = "1 router remembers" if num_routers == 1 else f"{num_routers} routers remember"
    return [*lines, "", f"of {num_kept} requests that {routers}; `octavo trace REQUEST` explains one"]


def seconds(duration_s: float) -> str:
    """Return a duration for people."""
    if abs(duration_s) >= 100:
        return f"{duration_s:.0f} s"
    return f"{duration_s:.3f} s" if abs(duration_s) >= 1 else f"{duration_s * 1000:.1f} ms"


def parts(record: pb.RequestRecord) -> list[Part]:
    """Return what the whole time consists of, in its order; it adds up."""
    end_s = record.duration_s
    if not record.HasField("queued_at_s"):
        return [Part("checked", end_s)]
    over_s = record.computed_at_s if record.HasField("computed_at_s") else end_s
    found, at_s = [Part("checked", record.queued_at_s)], record.queued_at_s
    for attempt in record.attempts:
        left_s = attempt.left_at_s if attempt.HasField("left_at_s") else over_s
        found += [Part("queued", attempt.sent_at_s - at_s), Part("at the replica", left_s - attempt.sent_at_s)]
        at_s = left_s
    if over_s - at_s > MIN_REST_S:
        found.append(Part("queued", over_s - at_s))
        at_s = over_s
    return found if record.is_running else [*found, Part("sending the rest", end_s - at_s)]


def _heading(record: pb.RequestRecord) -> Iterator[str]:
    way = "Session" if record.is_session else "Generate"
    words = [f"model {record.model or '-'}", f"over {way}"]
    if record.tenant:
        words.append(f"tenant {record.tenant}")
    if record.priority:
        words.append(f"priority {record.priority}")
    yield f"request {record.request_id}: {', '.join(words)}"
    arrived = datetime.datetime.fromtimestamp(record.arrived_at, datetime.UTC)
    yield f"  trace {record.trace_id or '-'}, router {record.router}"
    yield f"  arrived {arrived:%Y-%m-%d %H:%M:%S}.{arrived.microsecond // 1000:03} UTC, {_deadline(record)}"
    yield f"  {_outcome(record)}"


def _deadline(record: pb.RequestRecord) -> str:
    whose = "as its client asked" if record.has_own_deadline else "the router's default"
    return f"might take {seconds(record.timeout_s)} ({whose})"


def _outcome(record: pb.RequestRecord) -> str:
    took = seconds(record.duration_s)
    if record.HasField("first_token_at_s"):
        took += f", with the first token after {seconds(record.first_token_at_s)}"
    if record.is_running:
        return f"is under way, for {took}"
    if record.reason:
        return f"{record.code} ({record.reason}) after {took}: {record.message}"
    return f"OK after {took}: {record.generated_tokens} tokens, {', '.join(record.finish_reasons)}"


def _story(record: pb.RequestRecord) -> Iterator[str]:
    if not record.HasField("queued_at_s"):
        what = "refused" if record.reason and not record.is_running else "checked"
        yield _line(0, record.duration_s, f"{what}, before it was queued")
        return
    tokens = f"{record.prompt_tokens} prompt tokens, at most {record.max_tokens} to generate"
    if record.num_choices > 1:
        tokens += f" for each of {record.num_choices} choices"
    if record.received_tokens:
        tokens += f", {record.received_tokens} of them there from an earlier try"
    yield _line(0, record.queued_at_s, f"checked, and its text turned into tokens: {tokens}")
    over_s = record.computed_at_s if record.HasField("computed_at_s") else record.duration_s
    for attempt in record.attempts:
        yield _line(attempt.queued_at_s, attempt.wait_s, f"queued: {_why(attempt)}")
        yield from _placed(attempt)
        yield from _computed(record, attempt, over_s)
    yield from _unplaced(record, over_s)
    yield from _sent(record, over_s)


def _why(attempt: pb.RequestRecord.Attempt) -> str:
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


def _placed(attempt: pb.RequestRecord.Attempt) -> Iterator[str]:
    decision = attempt.decision
    placed = f"placed on {decision.replica}, {_rule(decision)} ({decision.rule}); {_batch(attempt)}"
    yield _line(attempt.sent_at_s, None, placed)
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


def _computed(record: pb.RequestRecord, attempt: pb.RequestRecord.Attempt, over_s: float) -> Iterator[str]:
    left_s = attempt.left_at_s if attempt.HasField("left_at_s") else over_s
    num_computed = max(record.prompt_tokens - attempt.cached_tokens, 0)
    cached = f"{attempt.cached_tokens} of {record.prompt_tokens} prompt tokens were cached, {num_computed} computed"
    if attempt.decision.attempt > 1:
        cached = f"{attempt.cached_tokens} tokens of prompt and answer were cached"
    at_s = attempt.sent_at_s
    if attempt.HasField("engine"):
        engine = attempt.engine
        yield _line(at_s, engine.queue_s, "waited in the replica for a step")
        yield _line(at_s + engine.queue_s, engine.prefill_s, f"prefilled: {cached}")
        yield _line(at_s + engine.queue_s + engine.prefill_s, engine.decode_s, _decoded(attempt, record.num_choices))
        rest_s = left_s - at_s - engine.queue_s - engine.prefill_s - engine.decode_s
        if rest_s > MIN_REST_S:
            yield _line(None, rest_s, "on the way to the replica and back")
    elif attempt.HasField("first_token_at_s"):
        yield _line(at_s, attempt.first_token_at_s - at_s, f"first token: {cached}")
        what = f"decoded: {attempt.num_tokens} tokens {_untold(record, attempt)}"
        yield _line(attempt.first_token_at_s, left_s - attempt.first_token_at_s, what)
    else:
        yield _line(at_s, left_s - at_s, "no token has come")
    if attempt.loss_reason:
        yield _line(left_s, None, f"lost ({attempt.loss_reason}): {attempt.loss}; what was there is kept, the rest")
        yield f"{'':21}   is computed elsewhere"


def _untold(record: pb.RequestRecord, attempt: pb.RequestRecord.Attempt) -> str:
    """Say why there are no steps to tell."""
    if attempt.loss_reason:
        return "came before it was lost"
    return "so far" if record.is_running else "came before the router ended it (so the replica tells no steps)"


def _decoded(attempt: pb.RequestRecord.Attempt, num_choices: int) -> str:
    engine, words = attempt.engine, f"decoded: {attempt.num_tokens} tokens"
    if engine.num_steps:
        words += f" in {engine.num_steps} steps of the engine, those of the prefill among them"
    if (num_each := attempt.num_tokens / max(num_choices, 1)) > 1:
        words += f", {seconds(engine.decode_s / (num_each - 1))} a token"
    times = "time" if engine.num_preemptions == 1 else "times"
    return f"{words}, preempted {engine.num_preemptions} {times}"


def _unplaced(record: pb.RequestRecord, over_s: float) -> Iterator[str]:
    """The wait that no replica ended."""
    last = record.attempts[-1] if record.attempts else None
    if last is None:
        what = "queued, and still waiting" if record.is_running else "queued, and not sent to a replica"
        yield _line(record.queued_at_s, over_s - record.queued_at_s, what)
    elif last.loss_reason and over_s - last.left_at_s > MIN_REST_S:
        yield _line(last.left_at_s, over_s - last.left_at_s, "queued again, for another replica")


def _sent(record: pb.RequestRecord, over_s: float) -> Iterator[str]:
    after_s = None if record.is_running else record.duration_s - over_s
    if not record.num_messages:
        yield _line(over_s, after_s, "nothing of an answer was sent")
        return
    each = record.sent_tokens / record.num_messages
    yield _line(
        over_s,
        after_s,
        f"sent: {record.sent_tokens} tokens coalesced in {record.num_messages} messages ({each:.1f} a message), the "
        f"first at {seconds(record.first_sent_at_s)}, the last at {seconds(record.last_sent_at_s)}",
    )
    if record.num_attachments:
        yield f"{'':21}   its client came back for it {record.num_attachments} times, over another Session"


def _sum(record: pb.RequestRecord) -> str:
    """Return the parts, those of the same name together."""
    together: dict[str, float] = {}
    for part in parts(record):
        together[part.name] = together.get(part.name, 0.0) + part.duration_s
    terms = " + ".join(f"{name} {seconds(duration_s)}" for name, duration_s in together.items())
    return f"{terms} = {seconds(record.duration_s)}"


def _line(at_s: float | None, took_s: float | None, what: str) -> str:
    """Return a line of the story: when, how long, what."""
    at, took = ("" if each is None else seconds(each) for each in (at_s, took_s))
    return f"{at:>10} {took:>10}   {what}"
