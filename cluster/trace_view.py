"""One request's record in words, from its arrival to its last message, with the sum of its parts; and lists of records.

Plain lines, each with when it began and how long it took. Pure. What a client or an error wrote is quoted as it is:
whoever prints it sees to control characters.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from octavo.v1 import status_service_pb2 as pb

from cluster.trace_words import MIN_REST_S, line, placed, seconds, why

_POOL_CALLS: Final = {"embeddings": "Embed", "score": "Score", "rerank": "Rerank", "classify": "Classify"}
"""Operations whose inputs go side by side, by the call for each."""
_COLUMNS: Final = ("took", "queued", "first token", "prompt", "generated", "replicas", "ended", "model", "request")


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
        waits = [attempt.wait_s for attempt in record.attempts]
        queued, num_replicas = sum(waits), len(waits)
        if _is_pool(record):
            queued = max(waits, default=0.0)
            num_replicas = len({attempt.decision.replica for attempt in record.attempts})
        numbers = (record.prompt_tokens, record.generated_tokens, num_replicas)
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


def parts(record: pb.RequestRecord) -> list[Part]:
    """Return what the whole time consists of, in its order; it adds up."""
    end_s = record.duration_s
    if not record.HasField("queued_at_s"):
        return [Part("checked", end_s)]
    over_s = record.computed_at_s if record.HasField("computed_at_s") else end_s
    found, at_s = [Part("checked", record.queued_at_s)], record.queued_at_s
    for sent_s, left_s in _stays(record, over_s):
        found += [Part("queued", sent_s - at_s), Part("at the replica", left_s - sent_s)]
        at_s = left_s
    if over_s - at_s > MIN_REST_S:
        found.append(Part("queued", over_s - at_s))
        at_s = over_s
    return found if record.is_running else [*found, Part("sending the rest", end_s - at_s)]


def _is_pool(record: pb.RequestRecord) -> bool:
    """Say whether numbers were asked for."""
    return record.operation in _POOL_CALLS


def _stays(record: pb.RequestRecord, over_s: float) -> list[tuple[float, float]]:
    """Return from when to when replicas had it, one after the other: inputs that go side by side have one stay."""
    stays = [
        (attempt.sent_at_s, attempt.left_at_s if attempt.HasField("left_at_s") else over_s)
        for attempt in record.attempts
    ]
    return [(min(stays)[0], over_s)] if stays and _is_pool(record) else stays


def _heading(record: pb.RequestRecord) -> Iterator[str]:
    way = _POOL_CALLS.get(record.operation, "Session" if record.is_session else "Generate")
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
    if _is_pool(record):
        return f"OK after {took}"
    return f"OK after {took}: {record.generated_tokens} tokens, {', '.join(record.finish_reasons)}"


def _story(record: pb.RequestRecord) -> Iterator[str]:
    if not record.HasField("queued_at_s"):
        what = "refused" if record.reason and not record.is_running else "checked"
        yield line(0, record.duration_s, f"{what}, before it was queued")
        return
    if _is_pool(record):
        yield from _side_by_side(record)
        return
    tokens = f"{record.prompt_tokens} prompt tokens, at most {record.max_tokens} to generate"
    if record.num_choices > 1:
        tokens += f" for each of {record.num_choices} choices"
    if record.received_tokens:
        tokens += f", {record.received_tokens} of them there from an earlier try"
    yield line(0, record.queued_at_s, f"checked, and its text turned into tokens: {tokens}")
    over_s = record.computed_at_s if record.HasField("computed_at_s") else record.duration_s
    for attempt in record.attempts:
        yield line(attempt.queued_at_s, attempt.wait_s, f"queued: {why(attempt)}")
        yield from placed(attempt)
        yield from _computed(record, attempt, over_s)
    yield from _unplaced(record, over_s)
    yield from _sent(record, over_s)


def _side_by_side(record: pb.RequestRecord) -> Iterator[str]:
    """The story of a call for numbers: each input by itself, at its own times."""
    over_s = record.computed_at_s if record.HasField("computed_at_s") else record.duration_s
    yield line(0, record.queued_at_s, f"checked, and its inputs turned into tokens: {record.prompt_tokens}")
    if record.attempts:
        yield line(record.queued_at_s, None, "from here on its inputs go side by side; the first that went:")
    for attempt in record.attempts:
        yield line(attempt.queued_at_s, attempt.wait_s, f"queued: {why(attempt)}")
        yield from placed(attempt)
        left_s = attempt.left_at_s if attempt.HasField("left_at_s") else over_s
        at_replica = "at the replica, until it was lost" if attempt.loss_reason else "at the replica"
        yield line(attempt.sent_at_s, left_s - attempt.sent_at_s, at_replica)
        if attempt.loss_reason:
            yield line(left_s, None, f"lost ({attempt.loss_reason}): {attempt.loss}; it is computed again elsewhere")
    if not record.attempts:
        yield from _unplaced(record, over_s)
    elif record.attempts[-1].HasField("engine"):
        engine = record.attempts[-1].engine
        waited, computed = seconds(engine.queue_s), seconds(engine.prefill_s)
        yield line(
            over_s, None, f"no input waited for its step longer than {waited}, or took longer than {computed} then"
        )
    if not record.is_running:
        yield line(over_s, record.duration_s - over_s, "ended, with all numbers in one message or none")


def _computed(record: pb.RequestRecord, attempt: pb.RequestRecord.Attempt, over_s: float) -> Iterator[str]:
    left_s = attempt.left_at_s if attempt.HasField("left_at_s") else over_s
    num_computed = max(record.prompt_tokens - attempt.cached_tokens, 0)
    cached = f"{attempt.cached_tokens} of {record.prompt_tokens} prompt tokens were cached, {num_computed} computed"
    if attempt.decision.attempt > 1:
        cached = f"{attempt.cached_tokens} tokens of prompt and answer were cached"
    at_s = attempt.sent_at_s
    if attempt.HasField("engine"):
        engine = attempt.engine
        yield line(at_s, engine.queue_s, "waited in the replica for a step")
        yield line(at_s + engine.queue_s, engine.prefill_s, f"prefilled: {cached}")
        yield line(at_s + engine.queue_s + engine.prefill_s, engine.decode_s, _decoded(attempt, record.num_choices))
        rest_s = left_s - at_s - engine.queue_s - engine.prefill_s - engine.decode_s
        if rest_s > MIN_REST_S:
            yield line(None, rest_s, "on the way to the replica and back")
    elif attempt.HasField("first_token_at_s"):
        yield line(at_s, attempt.first_token_at_s - at_s, f"first token: {cached}")
        what = f"decoded: {attempt.num_tokens} tokens {_untold(record, attempt)}"
        yield line(attempt.first_token_at_s, left_s - attempt.first_token_at_s, what)
    else:
        yield line(at_s, left_s - at_s, "no token has come")
    if attempt.loss_reason:
        yield line(left_s, None, f"lost ({attempt.loss_reason}): {attempt.loss}; what was there is kept, the rest")
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
        yield line(record.queued_at_s, over_s - record.queued_at_s, what)
    elif last.loss_reason and over_s - last.left_at_s > MIN_REST_S:
        yield line(last.left_at_s, over_s - last.left_at_s, "queued again, for another replica")


def _sent(record: pb.RequestRecord, over_s: float) -> Iterator[str]:
    after_s = None if record.is_running else record.duration_s - over_s
    if not record.num_messages:
        yield line(over_s, after_s, "nothing of an answer was sent")
        return
    each = record.sent_tokens / record.num_messages
    yield line(
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
