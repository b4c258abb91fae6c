"""What `octavo trace` makes of a record, word for word, and where it finds routers."""

from __future__ import annotations

from typing import Any

import pytest
from octavo.v1 import status_service_pb2 as pb
from octavo.v1 import types_pb2 as types

from cluster.cli_trace import _reachable
from cluster.trace_view import explained, listed, parts
from cluster.trace_words import seconds


def candidate(name: str, *, owed: float = 0.0, uncached: float = 0.0, matched: int = 0) -> types.Decision.Candidate:
    return types.Decision.Candidate(
        replica=name, owed_tokens=owed, uncached_tokens=uncached, matched_tokens=matched, cost=owed + uncached
    )


def attempt(replica: str, number: int = 1, **fields: Any) -> pb.RequestRecord.Attempt:
    candidates = [candidate(replica, uncached=64.0, matched=448), candidate("other", owed=10.0, uncached=512.0)]
    decision = types.Decision(replica=replica, rule="prefix", candidates=candidates, attempt=number)
    given = {"batch_id": 17, "batch_requests": 3, "batch_tokens": 700} | fields
    return pb.RequestRecord.Attempt(decision=decision, **given)


def record(*attempts: pb.RequestRecord.Attempt, **fields: Any) -> pb.RequestRecord:
    given: dict[str, Any] = {
        "request_id": "a",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "model": "toy",
        "router": "r1",
        "arrived_at": 1_700_000_000.25,
        "duration_s": 2.0,
        "code": "OK",
        "timeout_s": 600.0,
        "num_choices": 1,
        "max_tokens": 128,
        "prompt_tokens": 512,
        "generated_tokens": 100,
        "finish_reasons": ["stop"],
        "queued_at_s": 0.001,
        "computed_at_s": 1.9,
        "num_messages": 40,
        "sent_tokens": 100,
        "first_token_at_s": 0.26,
        "first_sent_at_s": 0.5,
        "last_sent_at_s": 1.95,
    }
    return pb.RequestRecord(attempts=attempts, **(given | fields))


ENGINE = pb.RequestRecord.Engine(queue_s=0.002, prefill_s=0.04, decode_s=0.99, num_steps=102, num_preemptions=1)


def test_one_attempt_word_for_word() -> None:
    only = attempt(
        "one",
        queued_at_s=0.001,
        wait_s=0.21,
        full_s=0.18,
        num_waiting=12,
        num_gone=14,
        sent_at_s=0.211,
        cached_tokens=448,
        first_token_at_s=0.26,
        num_tokens=100,
        left_at_s=1.9,
        engine=ENGINE,
    )
    assert explained(record(only, tenant="acme", priority=5, is_session=True)) == [
        "request a: model toy, over Session, tenant acme, priority 5",
        "  trace 0af7651916cd43dd8448eb211c80319c, router r1",
        "  arrived 2023-11-14 22:13:20.250 UTC, might take 600 s (the router's default)",
        "  OK after 2.000 s, with the first token after 260.0 ms: 100 tokens, stop",
        "",
        "        at       took",
        "    0.0 ms     1.0 ms   checked, and its text turned into tokens: 512 prompt tokens, at most 128 to generate",
        "    1.0 ms   210.0 ms   queued: nobody was free for 180.0 ms, its turn, or its batch, came after 30.0 ms "
        "more; 12 waited when it came, 14 went before it",
        "  211.0 ms              placed on one, for what it has of the prompt (prefix); in batch 17 with 2 others, "
        "700 tokens",
        "                        -> one    cost 64 = 64 of this prompt to compute (it has 448)",
        "                           other  cost 522 = 512 of this prompt to compute + 10 owed to others (it has 0)",
        "  211.0 ms     2.0 ms   waited in the replica for a step",
        "  213.0 ms    40.0 ms   prefilled: 448 of 512 prompt tokens were cached, 64 computed",
        "  253.0 ms   990.0 ms   decoded: 100 tokens in 102 steps of the engine, those of the prefill among them, 10.0 "
        "ms a token, preempted 1 time",
        "             657.0 ms   on the way to the replica and back",
        "   1.900 s   100.0 ms   sent: 100 tokens coalesced in 40 messages (2.5 a message), the first at 500.0 ms, the "
        "last at 1.950 s",
        "",
        "checked 1.0 ms + queued 210.0 ms + at the replica 1.689 s + sending the rest 100.0 ms = 2.000 s",
    ]


def test_two_attempts_and_a_client_that_came_back() -> None:
    first = attempt(
        "one",
        queued_at_s=0.001,
        wait_s=0.0,
        sent_at_s=0.001,
        first_token_at_s=0.1,
        num_tokens=30,
        left_at_s=0.5,
        loss_reason="REPLICA_LOST",
        loss="replica one was lost: gone",
    )
    second = attempt(
        "two",
        2,
        queued_at_s=0.5,
        wait_s=0.3,
        no_replica_s=0.3,
        sent_at_s=0.8,
        num_tokens=70,
        left_at_s=1.9,
        engine=ENGINE,
    )
    told = record(first, second, num_attachments=2, num_choices=2, received_tokens=3)
    text = "\n".join(explained(told))
    assert "at most 128 to generate for each of 2 choices, 3 of them there from an earlier try" in text
    assert "100.0 ms   400.0 ms   decoded: 30 tokens came before it was lost" in text
    assert "500.0 ms              lost (REPLICA_LOST): replica one was lost: gone; what was there is kept" in text
    assert "queued: no replica was ready for 300.0 ms" in text
    assert "0 tokens of prompt and answer were cached" in text
    assert "its client came back for it 2 times, over another Session" in text
    assert text.endswith("queued 300.0 ms + at the replica 1.599 s + sending the rest 100.0 ms = 2.000 s")


def test_what_never_reached_a_replica_or_another_one() -> None:
    refused = pb.RequestRecord(
        request_id="a", duration_s=0.002, code="NOT_FOUND", reason="MODEL_NOT_FOUND", message="no"
    )
    assert "  NOT_FOUND (MODEL_NOT_FOUND) after 2.0 ms: no" in explained(refused)
    assert explained(refused)[-1] == "checked 2.0 ms = 2.0 ms"
    late = record(code="DEADLINE_EXCEEDED", reason="DEADLINE_PASSED", message="late", num_messages=0)
    text = "\n".join(explained(late))
    assert "1.0 ms    1.899 s   queued, and not sent to a replica" in text
    assert "nothing of an answer was sent" in text
    lost = attempt("one", sent_at_s=0.2, left_at_s=0.5, loss_reason="DRAINING", loss="it drains")
    text = "\n".join(explained(record(lost, reason="NO_REPLICA", code="UNAVAILABLE", message="none")))
    assert "200.0 ms   300.0 ms   no token has come" in text
    assert "500.0 ms    1.400 s   queued again, for another replica" in text


def pool_call(**fields: Any) -> pb.RequestRecord:
    """Embed with three inputs: the second waits for 10 ms, the third, too, and is computed twice."""
    times: list[dict[str, Any]] = [
        {"wait_s": 0.0, "sent_at_s": 0.001, "left_at_s": 0.06},
        {"wait_s": 0.01, "full_s": 0.01, "sent_at_s": 0.011, "left_at_s": 0.07},
        {"wait_s": 0.01, "full_s": 0.01, "sent_at_s": 0.011, "left_at_s": 0.03, "loss_reason": "REPLICA_LOST"},
        {"wait_s": 0.0, "queued_at_s": 0.03, "sent_at_s": 0.03, "left_at_s": 0.08, "engine": ENGINE},
    ]
    attempts = [
        attempt(name, **({"queued_at_s": 0.001} | each)) for name, each in zip(("one", "two") * 2, times, strict=True)
    ]
    given = {"operation": "embeddings", "num_choices": 0, "max_tokens": 0, "generated_tokens": 0, "num_messages": 0}
    told = record(*attempts, **(given | {"computed_at_s": 0.08, "duration_s": 0.081, "finish_reasons": []} | fields))
    told.ClearField("first_token_at_s")
    return told


def test_inputs_of_a_call_for_numbers_go_side_by_side() -> None:
    """They were told as if one went after the other: a wait of less than nothing made the sum right."""
    lines = explained(pool_call())
    assert lines[0] == "request a: model toy, over Embed"
    assert lines[3] == "  OK after 81.0 ms"
    assert lines[-1] == "checked 1.0 ms + queued 0.0 ms + at the replica 79.0 ms + sending the rest 1.0 ms = 81.0 ms"
    story = [line for line in lines[6:-2] if not line.startswith(" " * 21)]
    assert [line.split("   ")[-1].strip().split(":")[0] for line in story if "placed" not in line] == [
        "checked, and its inputs turned into tokens",
        "from here on its inputs go side by side; the first that went",
        *("queued", "at the replica"),
        *("queued", "at the replica"),
        *("queued", "at the replica, until it was lost", "lost (REPLICA_LOST)"),
        *("queued", "at the replica"),
        "no input waited for its step longer than 2.0 ms, or took longer than 40.0 ms then",
        "ended, with all numbers in one message or none",
    ]
    text = "\n".join(lines)
    assert "   1.0 ms    10.0 ms   queued: nobody was free for 10.0 ms" in text
    assert "  11.0 ms    59.0 ms   at the replica" in text
    assert sum(part.duration_s for part in parts(pool_call(is_running=True))) == pytest.approx(0.08)
    row = listed([pool_call()], num_kept=1, num_routers=1)[1].split()
    assert row[2:8] == ["10.0", "ms", "-", "512", "0", "2"]


def test_a_call_for_numbers_that_nobody_took() -> None:
    told = pool_call(reason="DEADLINE_PASSED", code="DEADLINE_EXCEEDED", message="late")
    del told.attempts[:]
    told.ClearField("computed_at_s")
    text = "\n".join(explained(told))
    assert "1.0 ms    80.0 ms   queued, and not sent to a replica" in text
    assert text.endswith("checked 1.0 ms + queued 80.0 ms + sending the rest 0.0 ms = 81.0 ms")


@pytest.mark.parametrize("is_running", [True, False])
def test_the_parts_are_the_whole(is_running: bool) -> None:
    attempts = [attempt("one", sent_at_s=0.2, left_at_s=0.5), attempt("two", 2, sent_at_s=0.8)]
    told = record(*attempts, is_running=is_running)
    if is_running:
        told.ClearField("computed_at_s")
    assert sum(part.duration_s for part in parts(told)) == pytest.approx(told.duration_s)


def test_what_others_have_said_is_in_the_list_as_it_is() -> None:
    rows = listed([record(attempt("one", wait_s=0.5))], num_kept=7, num_routers=2)
    assert rows[0].endswith("generated  replicas  ended  model  request")
    assert rows[1].split() == ["2.000", "s", "500.0", "ms", "260.0", "ms", "512", "100", "1", "OK", "toy", "a"]
    assert rows[-1] == "of 7 requests that 2 routers remember; `octavo trace REQUEST` explains one"


def test_durations() -> None:
    assert [seconds(value) for value in (0.0, 0.00123, 0.9999, 1.5, 99.9994, 600)] == [
        "0.0 ms",
        "1.2 ms",
        "999.9 ms",
        "1.500 s",
        "99.999 s",
        "600 s",
    ]


def test_a_router_on_all_addresses_is_asked_where_the_first_one_was() -> None:
    assert _reachable("10.0.0.2:5001", "node-1:50051") == "10.0.0.2:5001"
    assert _reachable("0.0.0.0:5001", "node-1:50051") == "node-1:5001"
    assert _reachable("[::]:5001", "[::1]:50051") == "[::1]:5001"
