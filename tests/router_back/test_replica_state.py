"""The leased account of one replica."""

from __future__ import annotations

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb

from router.replica_state import ReplicaState


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


def make_state(**load: int) -> ReplicaState:
    state = ReplicaState("one")
    resident = pb.KvEvents(cleared=True, stored=block(1) + block(2))
    state.start(pb.HelloAck(block_size=4, num_blocks=8, load=pb.Load(**load), resident=resident))
    return state


def report(last_batch_id: int, **load: int) -> pb.StepBatch:
    return pb.StepBatch(load=pb.Load(**load), last_batch_id=last_batch_id)


def test_what_was_sent_counts_until_a_report_counts_it() -> None:
    state = make_state(credit_tokens=100, owed_prefill_tokens=5, num_running=1, num_waiting=2)
    assert (state.credit_tokens, state.owed_tokens, state.num_running) == (100, 5, 3)
    state.sent(7, 30)
    state.sent(7, 30)
    state.sent(8, 50, num_choices=4)
    assert (state.credit_tokens, state.owed_tokens, state.num_running) == (-10, 115, 9)
    state.update(report(6, credit_tokens=90))
    assert (state.credit_tokens, state.owed_tokens, state.num_uncounted) == (-20, 110, 6)
    state.update(report(7, credit_tokens=40, owed_prefill_tokens=60, num_running=2))
    assert (state.credit_tokens, state.owed_tokens, state.num_running) == (-10, 110, 6)
    state.update(report(8, credit_tokens=100))
    assert (state.credit_tokens, state.owed_tokens, state.num_running, state.num_uncounted) == (100, 0, 0, 0)


def test_a_count_cannot_leak_when_requests_are_cancelled() -> None:
    """A peer counted up on send and down on completion; cancelled requests stayed for ever, and a fresh replica got
    everything (vllm-project/router#215). Here no one counts down: the next report is the truth."""
    state = make_state(credit_tokens=100)
    for batch_id in range(1, 1_000):
        state.sent(batch_id, 10)
    state.update(report(999, credit_tokens=100))
    assert (state.credit_tokens, state.owed_tokens, state.num_running) == (100, 0, 0)


def test_a_message_without_load_changes_no_account() -> None:
    state = make_state(credit_tokens=100)
    state.sent(1, 10)
    assert not state.update(pb.StepBatch(kv_events=pb.KvEvents(removed=block(1))))
    assert state.credit_tokens == 90
    assert state.resident == {block(2)}


def test_events_apply_removed_then_stored_and_cleared_first() -> None:
    state = make_state()
    state.update(pb.StepBatch(kv_events=pb.KvEvents(removed=block(1) + block(3), stored=block(3))))
    assert state.resident == {block(2), block(3)}
    state.update(pb.StepBatch(kv_events=pb.KvEvents(cleared=True, stored=block(9))))
    assert state.resident == {block(9)}


def test_a_broken_stream_leaves_nothing() -> None:
    state = make_state(credit_tokens=100, num_running=5)
    state.sent(1, 10)
    state.forget()
    assert (state.credit_tokens, state.owed_tokens, state.num_running, state.resident) == (0, 0, 0, set())


@pytest.mark.parametrize(
    ("events", "text"),
    [
        (pb.KvEvents(stored=b"short"), "16 bytes each, got 5"),
        (pb.KvEvents(stored=b"".join(block(i) for i in range(9))), "9 blocks are resident, the replica has 8"),
    ],
)
def test_what_no_replica_of_ours_says_is_an_error(events: pb.KvEvents, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_state().update(pb.StepBatch(kv_events=events))


def test_a_replica_without_a_block_size_is_none_of_ours() -> None:
    with pytest.raises(ValueError, match="block_size must be at least 1, is 0"):
        ReplicaState("one").start(pb.HelloAck())


def test_a_replica_without_places_has_no_credit() -> None:
    """Tokens alone let dozens of short prompts wait in a replica, where nobody can put them in order any more."""
    state = make_state(credit_tokens=100, credit_sequences=2)
    state.sent(1, 10)
    assert (state.credit_tokens, state.credit_sequences) == (90, 1)
    state.sent(1, 10)
    assert (state.credit_tokens, state.credit_sequences) == (0, 0)
    state.update(report(1, credit_tokens=80))
    assert state.credit_tokens == 80, "a replica that does not say takes any number"
