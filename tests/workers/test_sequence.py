"""A sequence's integers, endings, hashes and times."""

from __future__ import annotations

import pytest

from tests.workers.toy_engine import work
from workers.lookup import PromptLookup
from workers.prefix import PrefixHasher
from workers.sequence import Sequence
from workers.types import FinishReason, SamplingParams

HASHER = PrefixHasher(b"key", 4)


class Recorder:
    """A constraint that allows everything and remembers what it was told."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def mask(self) -> range:
        return range(100)

    def advance(self, token_id: int) -> None:
        self.seen.append(token_id)


def test_a_life_in_integers() -> None:
    sequence = Sequence(work(1, [1, 2, 3], 3))
    assert (sequence.num_prompt_tokens, sequence.num_tokens, sequence.num_to_schedule) == (3, 3, 3)
    assert sequence.schedule(2) is False
    assert sequence.is_in_flight
    sequence.commit(2, samples=False)
    assert not sequence.is_in_flight
    assert sequence.schedule(1) is True
    assert (sequence.num_tokens, len(sequence.tokens), sequence.num_placeholders) == (4, 3, 1)
    sequence.commit(1, samples=True)
    assert sequence.append(7) is None
    assert (sequence.num_computed, sequence.num_scheduled, sequence.num_tokens) == (3, 3, 4)


def test_guesses_count_as_far_as_they_were_right() -> None:
    sequence = Sequence(work(1, [1, 2, 3], 9))
    assert sequence.schedule(3)
    sequence.draft(4)
    assert (sequence.num_scheduled, sequence.num_tokens, sequence.num_answer_tokens) == (7, 8, 5)
    for token in (5, 6, 7):
        sequence.append(token)
    sequence.commit(3, samples=True, num_drafted=4, num_accepted=2)
    assert (sequence.num_computed, sequence.num_scheduled, sequence.num_tokens) == (5, 5, 6)


def test_guesses_follow_a_chunk_that_samples_and_no_constraint() -> None:
    sequence = Sequence(work(1, [1, 2, 3], 9))
    sequence.schedule(2)
    with pytest.raises(AssertionError):
        sequence.draft(1)
    with pytest.raises(AssertionError):
        Sequence(work(1, [1]), constraint=Recorder(), proposer=PromptLookup(1))


def test_who_guesses_waits_for_the_last_token() -> None:
    sequence = Sequence(work(1, [1], 9), proposer=PromptLookup(1))
    sequence.schedule(1)
    assert sequence.num_to_schedule == 0


def test_what_a_runner_and_the_tables_read_of_a_work() -> None:
    sequence = Sequence(work(1, [1, 2, 3], 9, adapter="style", num_logprobs=2))
    assert (sequence.adapter, sequence.num_logprobs, sequence.max_stored_tokens) == ("style", 2, 11)


def test_times_are_parted_at_the_start_and_at_the_first_token() -> None:
    sequence = Sequence(work(1, [1], stop_token_ids=frozenset({9})), arrived_at=1.0)
    sequence.started_at, sequence.first_token_at = 3.0, 7.0
    sequence.append(9)
    finish = sequence.finish(FinishReason.STOP, 15.0)
    assert (finish.queue_s, finish.prefill_s, finish.decode_s, finish.stop_token_id) == (2.0, 4.0, 8.0, 9)


def test_more_than_there_is_cannot_be_scheduled() -> None:
    sequence = Sequence(work(1, [1, 2, 3]))
    with pytest.raises(AssertionError):
        sequence.schedule(4)


def test_nothing_is_scheduled_beyond_max_tokens_nor_before_a_constraint_knows() -> None:
    last = Sequence(work(1, [1, 2], 1))
    last.schedule(2)
    assert last.num_to_schedule == 0
    free, bound = Sequence(work(1, [1, 2], 9)), Sequence(work(1, [1, 2], 9), constraint=Recorder())
    for sequence in (free, bound):
        sequence.schedule(2)
    assert (free.num_to_schedule, bound.num_to_schedule) == (1, 0)
    bound.commit(2, samples=True)
    bound.append(5)
    assert bound.num_to_schedule == 1


def test_a_constraint_is_told_what_was_received_and_what_is_drawn() -> None:
    constraint = Recorder()
    sequence = Sequence(work(1, [1, 2], 9, received=[[3, 4]]), constraint=constraint)
    sequence.append(5)
    assert constraint.seen == [3, 4, 5]
    assert sequence.tokens == [1, 2, 3, 4, 5]
    assert (sequence.num_prompt_tokens, sequence.num_answer_tokens) == (2, 3)


@pytest.mark.parametrize(
    ("received", "reason"),
    [([], None), ([5], None), ([9], FinishReason.STOP), ([5, 5], FinishReason.LENGTH), ([5, 9], FinishReason.STOP)],
)
def test_when_an_answer_is_complete(received: list[int], reason: FinishReason | None) -> None:
    assert Sequence(work(1, [9], 2, received=[received], stop_token_ids=frozenset({9}))).ending() is reason


def test_a_stop_token_is_banned_and_counts_for_nothing_before_min_tokens() -> None:
    sequence = Sequence(work(1, [9, 9], 5, received=[[9]], min_tokens=2, stop_token_ids=frozenset({9})))
    assert sequence.ending() is None, "a received one that came too early is a token like any other"
    assert [sequence.banned_at(position) for position in (2, 3, 4)] == [{9}, {9}, frozenset()]
    assert sequence.append(9) is None
    assert sequence.append(9) is FinishReason.STOP
    assert Sequence(work(1, [9], 1, min_tokens=5)).append(9) is FinishReason.LENGTH


def test_hashes_are_those_of_the_known_full_blocks() -> None:
    sequence = Sequence(work(1, range(6), 9, salt=b"s", adapter="a"))
    root = HASHER.root(b"s", "a")
    assert sequence.block_hashes(HASHER) == HASHER.blocks(root, range(4))
    for token in range(6, 13):
        sequence.append(token)
    assert sequence.block_hashes(HASHER) == HASHER.blocks(root, range(12))
    assert Sequence(work(1, [1])).block_hashes(HASHER) == []


def test_rank_is_priority_then_arrival() -> None:
    early, late = Sequence(work(1, [1]), arrival=1), Sequence(work(2, [1]), arrival=2)
    urgent = Sequence(work(3, [1], priority=-1), arrival=3)
    assert sorted([late, urgent, early], key=lambda s: s.rank) == [urgent, early, late]
    late.is_due = True
    assert sorted([late, urgent, early], key=lambda s: s.own_rank) == [late, urgent, early]


def test_choices_have_seeds_of_their_own() -> None:
    task = work(1, [1], sampling=SamplingParams(seed=7), n=2)
    assert [Sequence(task, index=i).sampling.seed for i in range(2)] == [7, 8]


def test_roll_back_leaves_the_last_token_to_be_computed() -> None:
    sequence = Sequence(work(1, [1, 2, 3]))
    sequence.schedule(3)
    sequence.commit(3, samples=True)
    sequence.roll_back()
    assert (sequence.num_computed, sequence.num_to_schedule) == (2, 1)


def test_times_of_one_that_never_started_are_all_queue() -> None:
    finish = Sequence(work(1, [1]), arrived_at=2.0).finish(FinishReason.ERROR, 5.0, ("REASON", "why"))
    assert (finish.queue_s, finish.prefill_s, finish.decode_s) == (3.0, 0.0, 0.0)
    assert (finish.error_reason, finish.error_message, finish.stop_token_id) == ("REASON", "why", None)
