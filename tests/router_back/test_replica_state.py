"""The leased account of one replica."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import xor

import pytest
from octavo.internal.v1 import data_plane_pb2 as pb

from router.prefix_index import Matches
from router.replica_state import PATIENCE, ReplicaState
from router.roster import Roster


def block(number: int) -> bytes:
    return number.to_bytes(16, "little")


def events(*, cleared: bool = False, removed: Iterable[int] = (), stored: Iterable[int] = ()) -> pb.KvEvents:
    return pb.KvEvents(cleared=cleared, removed=b"".join(map(block, removed)), stored=b"".join(map(block, stored)))


def make_state(roster: Roster | None = None, **load: int) -> ReplicaState:
    state = ReplicaState("one", roster)
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


def test_a_cache_that_fills_up_counts_without_a_new_load() -> None:
    roster = Roster()
    state = make_state(roster, credit_tokens=100)
    state.update(pb.StepBatch(kv_events=events(stored=range(3, 9))))
    roster.check_integrity()
    state.update(pb.StepBatch(kv_events=events(cleared=True)))
    roster.check_integrity()


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
    ("said", "text"),
    [
        (pb.KvEvents(stored=b"short"), "16 bytes each, got 5"),
        (pb.KvEvents(stored=b"".join(block(i) for i in range(9))), "9 blocks are resident, the replica has 8"),
    ],
)
def test_what_no_replica_of_ours_says_is_an_error(said: pb.KvEvents, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make_state().update(pb.StepBatch(kv_events=said))


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


def digest(*numbers: int) -> pb.Resident:
    return pb.Resident(num_blocks=len(numbers), digest=reduce(xor, numbers, 0))


def test_a_report_of_what_was_told_is_believed() -> None:
    state = make_state()
    state.update(pb.StepBatch(load=pb.Load(), resident=digest(1, 2)))
    state.update(pb.StepBatch(load=pb.Load(), resident=digest(2, 5), kv_events=events(removed=[1], stored=[5])))
    assert not state.needs_resync
    assert state.resident == {block(2), block(5)}


@pytest.mark.parametrize("truth", [(), (1,), (1, 3), (1, 2, 3)])
def test_what_is_not_what_was_told_is_forgotten_and_asked_for_once(truth: tuple[int, ...]) -> None:
    state = make_state()
    wrong = pb.StepBatch(load=pb.Load(), resident=digest(*truth))
    state.update(wrong)
    assert state.needs_resync
    assert not state.resident
    state.resync_asked()
    for _ in range(PATIENCE):
        state.update(wrong)
    assert (state.needs_resync, state.num_resyncs) == (False, 1)
    state.update(pb.StepBatch(kv_events=events(cleared=True, stored=truth)))
    state.update(wrong)
    assert (state.needs_resync, state.num_resyncs) == (False, 1)
    assert state.resident == {block(number) for number in truth}


def test_an_answer_that_never_comes_is_asked_for_again() -> None:
    state = make_state()
    for _ in range(1 + PATIENCE + 1):
        state.update(pb.StepBatch(load=pb.Load(), resident=digest(3)))
    assert state.num_resyncs == 2


def test_a_replica_that_is_never_right_is_asked_ever_less_often() -> None:
    state = make_state()
    for _ in range(1_000):
        state.update(pb.StepBatch(load=pb.Load(), resident=digest(3)))
        if state.needs_resync:
            state.resync_asked()
            state.update(pb.StepBatch(kv_events=events(cleared=True)))
    assert 8 <= state.num_resyncs <= 15


def test_blocks_of_a_prompt_are_expected_until_the_replica_says_something_of_its_work() -> None:
    roster = Roster()
    state = make_state(roster, credit_tokens=100)
    coming = [block(1), block(7), block(8)]
    state.expect(5, coming)
    state.expect(6, coming)
    assert roster.index.match(coming).shared == {0: (3, 1)}
    state.update(pb.StepBatch(load=pb.Load(), last_batch_id=9))
    assert state.num_expected == 2, "a report counts the work, which is still being computed"
    state.update(pb.StepBatch(deltas=[pb.WorkDelta(work_id=5, token_ids=[1])], kv_events=events(stored=[7])))
    assert roster.index.match(coming).shared == {0: (3, 2)}
    state.unexpect(6)
    state.unexpect(6)
    assert roster.index.match(coming).shared == {}
    assert roster.index.match(coming).runs == [(2, 1)]


@pytest.mark.parametrize("end", ["forget", "clear", "start"])
def test_no_guess_outlives_what_the_replica_says(end: str) -> None:
    roster = Roster()
    state = make_state(roster)
    state.expect(5, [block(7)])
    if end == "clear":
        state.update(pb.StepBatch(kv_events=events(cleared=True)))
    elif end == "start":
        state.start(pb.HelloAck(block_size=4, num_blocks=8))
    else:
        state.forget()
    assert state.num_expected == 0
    assert roster.index.match([block(7)]) == Matches([], {})
    roster.check_integrity()


def test_a_closed_replica_is_not_offered_and_keeps_its_books() -> None:
    roster = Roster()
    state = make_state(roster, credit_tokens=100)
    assert (roster.open, roster.able, roster.credit_tokens) == (1, 1, 100)
    state.close()
    assert (roster.open, roster.able, roster.credit_tokens) == (0, 0, 0)
    state.update(report(1, credit_tokens=50))
    assert (roster.open, roster.able, roster.credit_tokens) == (0, 0, 0)
    assert state.resident == {block(1), block(2)}
    roster.check_integrity()
