"""The queue before the replicas: order, expiry, when a batch goes, what it holds."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.batcher import Batcher, DispatchBatch
from router.order import FairOrder
from router.queued import Queued
from tests.router_back.made_requests import make_queued

PLENTY = 1_000_000


def queued(key: int, num_tokens: int = 10, *, since: float = 0.0, deadline: float = 100.0, priority: int = 0) -> Queued:
    return make_queued(key, range(num_tokens), since=since, accepted_at=since, deadline=deadline, priority=priority)


def make_batcher(*waiting: Queued, tokens: int = 100, requests: int = 4, wait_s: float = 0.5) -> Batcher:
    batcher = Batcher(FairOrder(), max_batch_tokens=tokens, max_batch_requests=requests, max_batch_wait_s=wait_s)
    for one in waiting:
        batcher.add(one)
    return batcher


def keys(batch: DispatchBatch | None) -> Sequence[int]:
    return [one.key for group in batch.groups for one in group] if batch else []


def drain(batcher: Batcher, now: float = 0.0, credit: int = PLENTY) -> list[Sequence[int]]:
    batches = []
    while batch := batcher.next_batch(now, credit):
        batches.append(keys(batch))
    return batches


def test_a_request_that_finds_nobody_waiting_goes_at_once() -> None:
    batcher = make_batcher(queued(1, since=5.0))
    batch = batcher.next_batch(5.0, credit_tokens=1)
    assert keys(batch) == [1]
    assert batch is not None
    assert (batch.batch_id, batch.num_tokens) == (1, 10)
    assert batcher.next_batch(5.0, PLENTY) is None
    assert batcher.next_event(PLENTY, 5.0) is None


def test_what_arrives_together_goes_together() -> None:
    assert drain(make_batcher(queued(1), queued(2), queued(3))) == [[1, 2, 3]]


def test_order_is_priority_then_acceptance_where_no_client_brought_a_deadline() -> None:
    batcher = make_batcher(
        queued(1, since=1.0, deadline=9.0),
        queued(2, since=2.0, deadline=8.0),
        queued(3, since=3.0, deadline=9.0, priority=-1),
        queued(4, since=4.0, deadline=8.0),
        requests=10,
    )
    assert drain(batcher) == [[3, 1, 2, 4]]


def test_an_expired_request_is_handed_back_and_not_sorted_as_the_most_urgent() -> None:
    """A peer sorted by deadline and so served the expired ones first (llm-d-batch-gateway#296)."""
    batcher = make_batcher(queued(1, deadline=1.0), queued(2, deadline=2.0), queued(3, deadline=3.0))
    assert [one.key for one in batcher.expire(2.0)] == [1, 2]
    assert drain(batcher, 2.0) == [[3]]
    assert batcher.expire(100.0) == []


def test_without_credit_nothing_goes() -> None:
    batcher = make_batcher(queued(1, deadline=7.0))
    assert batcher.next_batch(0.0, 0) is None
    assert batcher.next_batch(0.0, -5) is None
    assert batcher.next_event(0, 0.0) == 7.0


def test_after_a_lack_of_credit_a_batch_waits_for_company_so_long() -> None:
    batcher = make_batcher(queued(1, since=1.0), wait_s=0.5)
    assert batcher.next_batch(1.0, 0) is None
    batcher.add(queued(2, since=1.25))
    assert batcher.next_batch(1.25, PLENTY) is None
    assert batcher.next_event(PLENTY, 1.25) == 1.5
    assert keys(batcher.next_batch(1.5, PLENTY)) == [1, 2]


def test_a_full_batch_does_not_wait() -> None:
    by_requests = make_batcher(queued(1), queued(2), requests=2)
    by_tokens = make_batcher(queued(1, 60), queued(2, 60), tokens=100)
    for batcher, first in ((by_requests, [1, 2]), (by_tokens, [1])):
        assert batcher.next_batch(0.0, 0) is None
        assert keys(batcher.next_batch(0.0, PLENTY)) == first


def test_an_empty_queue_forgets_the_lack_of_credit() -> None:
    batcher = make_batcher(queued(1))
    assert batcher.next_batch(0.0, 0) is None
    assert batcher.remove(1, 0.0) is not None
    batcher.add(queued(2))
    assert keys(batcher.next_batch(0.0, PLENTY)) == [2]


def test_a_batch_is_bounded_in_tokens_requests_and_credit() -> None:
    assert drain(make_batcher(*(queued(i, 30) for i in range(5)), tokens=100)) == [[0, 1, 2], [3, 4]]
    assert drain(make_batcher(*(queued(i, 1) for i in range(5)), requests=4)) == [[0, 1, 2, 3], [4]]
    assert keys(make_batcher(*(queued(i, 30) for i in range(3))).next_batch(0.0, 40)) == [0, 1]


def test_a_request_larger_than_a_batch_goes_alone() -> None:
    assert drain(make_batcher(queued(1, 500), queued(2, 1), tokens=100)) == [[1], [2]]


def test_remove_takes_out_once() -> None:
    batcher = make_batcher(queued(1, 7), queued(2, 5))
    removed = batcher.remove(1, 0.0)
    assert removed is not None
    assert removed.num_tokens == 7
    assert batcher.remove(1, 0.0) is None
    assert (batcher.num_requests, batcher.num_tokens) == (1, 5)
    assert drain(batcher) == [[2]]


def test_those_that_wait_too_long_are_handed_back_in_order() -> None:
    batcher = make_batcher(queued(1, since=1.0), queued(2, since=2.0), queued(3, since=3.0))
    assert batcher.oldest_since == 1.0
    assert [one.key for one in batcher.waiting_since(2.0, 3.0)] == [1, 2]
    assert batcher.oldest_since == 3.0
    assert [one.key for one in batcher.waiting_since(3.0, 3.0)] == [3]
    assert batcher.oldest_since is None


def test_who_is_late_when_it_is_his_turn_is_put_aside() -> None:
    batcher = make_batcher(queued(1, deadline=1.0), queued(2))
    assert keys(batcher.next_batch(2.0, PLENTY)) == [2]
    assert [one.key for one in batcher.expire(2.0)] == [1]
    assert batcher.expire(2.0) == []


def test_sequences_are_credit_too() -> None:
    batcher = make_batcher(queued(1), queued(2), queued(3))
    assert keys(batcher.next_batch(0.0, PLENTY, credit_sequences=2)) == [1, 2]
    assert batcher.next_batch(0.0, PLENTY, credit_sequences=0) is None
    assert batcher.is_held


class BatcherMachine(RuleBasedStateMachine):
    """A few requests with colliding orders, against a list that is sorted anew each time."""

    def __init__(self) -> None:
        super().__init__()
        self.batcher = make_batcher(tokens=20, requests=3, wait_s=2.0)
        self.model: dict[int, Queued] = {}
        self.now = 0.0
        self.next_key = 0
        self.num_batches = 0

    @rule(
        num_tokens=st.integers(1, 30),
        patience=st.sampled_from([0.5, 3.0, 50.0]),
        priority=st.integers(-1, 1),
    )
    def add(self, num_tokens: int, patience: float, priority: int) -> None:
        self.next_key += 1
        one = queued(self.next_key, num_tokens, since=self.now, deadline=self.now + patience, priority=priority)
        self.model[one.key] = one
        self.batcher.add(one)

    @rule(by=st.sampled_from([0.25, 1.0, 4.0]))
    def pass_time(self, by: float) -> None:
        self.now += by

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model)))
        assert self.batcher.remove(key, self.now) is self.model.pop(key)

    @rule(credit=st.sampled_from([0, 5, 1_000]))
    def pump(self, credit: int) -> None:
        expired = self.batcher.expire(self.now)
        assert all(one.request.deadline <= self.now for one in expired)
        for one in expired:
            del self.model[one.key]
        assert all(one.request.deadline > self.now for one in self.model.values())
        while batch := self.batcher.next_batch(self.now, credit):
            self.num_batches += 1
            assert batch.batch_id == self.num_batches
            taken = [one for group in batch.groups for one in group]
            ordered = sorted(
                self.model.values(),
                key=lambda q: (q.request.priority, q.request.accepted_at, q.key),
            )
            assert taken == ordered[: len(taken)]
            assert 1 <= len(taken) <= 3
            assert batch.num_tokens == sum(one.num_tokens for one in taken)
            assert len(taken) == 1 or batch.num_tokens <= 20
            assert sum(one.num_tokens for one in taken[:-1]) < credit
            for one in taken:
                del self.model[one.key]
        if credit > 0 and self.model:
            event = self.batcher.next_event(credit, self.now)
            assert event is not None
            assert self.now < event <= min(one.since for one in self.model.values()) + 2.0

    @rule(age=st.sampled_from([0.5, 5.0]))
    def give_up(self, age: float) -> None:
        overdue = self.batcher.waiting_since(self.now - age, self.now)
        assert [one.key for one in overdue] == [k for k, q in self.model.items() if q.since <= self.now - age]
        for one in overdue:
            del self.model[one.key]

    @invariant()
    def agrees(self) -> None:
        self.batcher.check_integrity()
        assert self.batcher.num_requests == len(self.model)
        assert self.batcher.num_tokens == sum(one.num_tokens for one in self.model.values())


BatcherMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestBatcherMachine = BatcherMachine.TestCase
