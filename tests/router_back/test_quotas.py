"""Token buckets of tenants: what is refused, when to come again, what is given back, what is remembered."""

from __future__ import annotations

import math

import pytest
from octavo.names import Reason

from router.keyring import DEFAULT_TERMS, Terms
from router.quotas import SWEEP_SIZE, Quotas
from workers.errors import OverloadedError


def test_a_tenant_without_a_quota_is_neither_charged_nor_remembered() -> None:
    quotas = Quotas()
    assert quotas.charge("a", DEFAULT_TERMS, 10**9, 0.0) is None
    assert len(quotas) == 0


def test_the_request_after_the_last_one_of_a_minute_is_told_when_to_come_again() -> None:
    quotas, terms = Quotas(), Terms(requests_per_minute=60)
    for _ in range(60):
        quotas.charge("a", terms, 5, 100.0)
    with pytest.raises(OverloadedError, match="60 requests a minute") as refused:
        quotas.charge("a", terms, 5, 100.0)
    assert refused.value.reason == Reason.QUOTA_EXCEEDED
    assert refused.value.retry_after_s == pytest.approx(1.0)
    quotas.charge("a", terms, 5, 101.0 + 1e-6)
    quotas.charge("b", terms, 5, 100.0)  # its own quota


def test_a_refusal_costs_nothing() -> None:
    quotas, terms = Quotas(), Terms(requests_per_minute=2, tokens_per_minute=100)
    quotas.charge("a", terms, 80, 0.0)
    for _ in range(5):
        with pytest.raises(OverloadedError, match="100 tokens a minute"):
            quotas.charge("a", terms, 30, 0.0)
    quotas.charge("a", terms, 20, 0.0)  # the second request of two


def test_what_was_not_used_is_given_back() -> None:
    quotas, terms = Quotas(), Terms(tokens_per_minute=100)
    charge = quotas.charge("a", terms, 100, 0.0)
    assert charge is not None
    with pytest.raises(OverloadedError):
        quotas.charge("a", terms, 70, 0.0)
    quotas.settle(charge, num_used=30)
    quotas.charge("a", terms, 70, 0.0)


def test_what_was_taken_for_a_request_that_was_not_taken_on_is_given_back() -> None:
    quotas, terms = Quotas(), Terms(requests_per_minute=1, tokens_per_minute=100)
    for _ in range(3):
        charge = quotas.charge("a", terms, 100, 0.0)
        assert charge is not None
        quotas.refund(charge)
    quotas.charge("a", terms, 100, 0.0)
    with pytest.raises(OverloadedError):
        quotas.charge("a", terms, 1, 0.0)


def test_given_back_tokens_do_not_exceed_a_minute() -> None:
    quotas, terms = Quotas(), Terms(tokens_per_minute=100)
    charge = quotas.charge("a", terms, 100, 0.0)
    assert charge is not None
    quotas.settle(charge, num_used=0)
    quotas.charge("a", terms, 100, 600.0)
    with pytest.raises(OverloadedError):
        quotas.charge("a", terms, 1, 600.0)


def test_a_request_larger_than_the_quota_is_taken_on_when_nothing_is_owed_and_paid_off_later() -> None:
    quotas, terms = Quotas(), Terms(tokens_per_minute=60)
    assert quotas.charge("a", terms, 180, 0.0) is not None
    with pytest.raises(OverloadedError) as refused:
        quotas.charge("a", terms, 1, 0.0)
    assert refused.value.retry_after_s == pytest.approx(121.0)


def test_a_new_quota_holds_from_the_next_request_on() -> None:
    quotas = Quotas()
    quotas.charge("a", Terms(requests_per_minute=100), 1, 0.0)
    quotas.charge("a", Terms(requests_per_minute=1), 1, 0.0)
    with pytest.raises(OverloadedError):
        quotas.charge("a", Terms(requests_per_minute=1), 1, 0.0)
    assert quotas.charge("a", Terms(requests_per_minute=math.inf), 1, 0.0) is None


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    quotas, terms = Quotas(), Terms(requests_per_minute=1)
    quotas.charge("a", terms, 1, 10.0)
    with pytest.raises(OverloadedError):
        quotas.charge("a", terms, 1, 5.0)


def test_tenants_with_full_buckets_are_forgotten() -> None:
    quotas, terms = Quotas(), Terms(requests_per_minute=60)
    for number in range(10 * SWEEP_SIZE):
        quotas.charge(f"tenant {number}", terms, 1, number / 10)
    assert len(quotas) <= 2 * SWEEP_SIZE
