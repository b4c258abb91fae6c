"""The bounded backlog and the life of a permit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from octavo.names import Reason

from router.admission import MAX_RETRY_S, MIN_RETRY_S, RETRY_UNKNOWN_S, Admission, Permit, Throughput
from workers.errors import OverloadedError


def counts(admission: Admission) -> tuple[int, int, int]:
    backlog = admission.backlog()
    return backlog.num_queued_requests, backlog.num_queued_tokens, backlog.num_running_requests


def test_a_permit_is_queued_then_running_then_gone() -> None:
    admission = Admission(max_queued_tokens=100, max_queued_requests=10)
    permit = admission.admit(40, 0.0)
    assert counts(admission) == (1, 40, 0)
    permit.dispatched(1.0)
    assert counts(admission) == (0, 0, 1)
    permit.requeued(45)  # with five tokens of its answer
    assert counts(admission) == (1, 45, 0)
    permit.dispatched(2.0)
    permit.release()
    assert counts(admission) == (0, 0, 0)
    with pytest.raises(AssertionError):
        permit.release()


def test_more_tokens_or_requests_than_the_bound_are_refused_with_the_numbers() -> None:
    admission = Admission(max_queued_tokens=100, max_queued_requests=2)
    admission.admit(60, 0.0)
    with pytest.raises(OverloadedError, match=r"1 requests with 60 tokens.*has 41.*at most 2 requests and 100") as full:
        admission.admit(41, 0.0)
    assert full.value.reason == Reason.QUEUE_FULL
    assert full.value.retry_after_s == RETRY_UNKNOWN_S
    admission.admit(40, 0.0)
    with pytest.raises(OverloadedError):
        admission.admit(0, 0.0)
    assert counts(admission) == (2, 100, 0)


def test_a_request_counts_once_for_each_of_its_choices() -> None:
    admission = Admission(max_queued_tokens=100, max_queued_requests=8)
    permit = admission.admit(10, 0.0, num_choices=5)
    with pytest.raises(OverloadedError, match=r"5 requests with 10 tokens.*at most 8 requests"):
        admission.admit(1, 0.0, num_choices=4)
    other = admission.admit(1, 0.0, num_choices=3)
    assert counts(admission) == (2, 11, 0)
    permit.dispatched(0.0)
    permit.requeued(10)
    with pytest.raises(OverloadedError):
        admission.admit(1, 0.0)
    permit.release()
    admission.admit(1, 0.0, num_choices=5).release()
    other.release()
    assert counts(admission) == (0, 0, 0)


def test_a_request_larger_than_the_bound_is_taken_by_an_empty_queue() -> None:
    admission = Admission(max_queued_tokens=100, max_queued_requests=2)
    admission.admit(500, 0.0).release()
    admission.admit(1, 0.0)
    with pytest.raises(OverloadedError):
        admission.admit(500, 0.0)


def test_a_lost_request_is_queued_again_even_when_the_queue_is_full() -> None:
    admission = Admission(max_queued_tokens=100, max_queued_requests=2)
    lost = admission.admit(60, 0.0)
    lost.dispatched(0.0)
    admission.admit(90, 0.0)
    lost.requeued(60)
    assert counts(admission) == (2, 150, 0)


def test_the_advice_when_to_come_back_follows_the_measured_throughput() -> None:
    admission = Admission(max_queued_tokens=1_000, max_queued_requests=100)
    for tenth in range(200):
        permit = admission.admit(20, tenth / 10)
        permit.dispatched(tenth / 10)
        permit.release()
    admission.admit(1_000, 20.0)
    advice = []
    for num_tokens in (1, 400, 100_000):
        with pytest.raises(OverloadedError) as full:
            admission.admit(num_tokens, 20.0)
        assert full.value.retry_after_s is not None
        advice.append(full.value.retry_after_s)
    assert advice[0] == MIN_RETRY_S
    assert advice[1] == pytest.approx(2.0, rel=0.1)
    assert advice[2] == MAX_RETRY_S


def test_throughput_is_right_from_the_start_and_fades() -> None:
    throughput = Throughput()
    assert throughput.per_second(0.0) == 0.0
    for second in range(1, 4):
        throughput.add(100, float(second))
    assert throughput.per_second(3.5) == pytest.approx(110, rel=0.15)
    assert throughput.per_second(60.0) < 1.0


@given(
    st.lists(st.tuples(st.sampled_from(["admit", "dispatch", "requeue", "release"]), st.integers(1, 60)), max_size=80)
)
def test_the_books_agree_whatever_happens(operations: list[tuple[str, int]]) -> None:
    admission = Admission(max_queued_tokens=100, max_queued_requests=4)
    queued: list[tuple[Permit, int]] = []
    running: list[tuple[Permit, int]] = []
    for now, (operation, number) in enumerate(operations):
        if operation == "admit":
            try:
                queued.append((admission.admit(number, float(now)), number))
            except OverloadedError:
                tokens = sum(tokens for _, tokens in queued)
                assert len(queued) >= 4 or tokens + number > 100
        elif operation == "dispatch" and queued:
            permit, tokens = queued.pop(number % len(queued))
            permit.dispatched(float(now))
            running.append((permit, tokens))
        elif operation == "requeue" and running:
            permit, tokens = running.pop(number % len(running))
            tokens += number % 3
            permit.requeued(tokens)
            queued.append((permit, tokens))
        elif operation == "release" and (queued or running):
            source = queued or running
            source.pop(number % len(source))[0].release()
        assert counts(admission) == (len(queued), sum(tokens for _, tokens in queued), len(running))
