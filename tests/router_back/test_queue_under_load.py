"""What the queue is for, in a world whose clock jumps: overload, deadlines, greedy tenants, full backlogs."""

from __future__ import annotations

import random

import pytest
from octavo.names import Reason

from router.types import Request
from tests.router_back.queue_simulation import Fates, percentile, poisson, request, simulate


def impatient(rate: float, duration_s: float, seed: int = 1) -> list[Request]:
    rng = random.Random(seed)
    return [
        request(f"r{i}", at, timeout_s=rng.uniform(0.5, 3.0)) for i, at in enumerate(poisson(rng, rate, duration_s))
    ]


def test_at_ten_times_the_load_nearly_all_that_is_computed_is_in_time() -> None:
    """By deadlines alone, with a queue in the replica as well, 50 of 5,924 were: each was sent when it was too late."""
    plan = impatient(600.0, 10.0)
    fates = simulate(plan, places=6, service_s=0.1)
    assert len(fates.answered) >= 0.9 * 60 * 10
    assert len(fates.late) <= 0.05 * len(fates.answered)
    refusals = list(fates.refused.values())
    assert len(refusals) >= 0.9 * (len(plan) - len(fates.answered)), "most are told at once"
    assert {error.reason for error in refusals} == {Reason.DEADLINE_TOO_SHORT}
    assert all(error.retry_after_s for error in refusals)


def test_answers_that_vary_are_begun_early_enough() -> None:
    """Begun when an average answer would just be in time, every fifth was late."""
    fates = simulate(impatient(600.0, 20.0), places=12, service_s=0.2, jitter=1.0)
    assert len(fates.answered) >= 0.9 * 60 / 1.5 * 20
    assert len(fates.late) <= 0.1 * len(fates.answered)


def test_without_a_deadline_of_its_own_nobody_is_refused_for_time() -> None:
    rng = random.Random(2)
    plan = [request(f"r{i}", at) for i, at in enumerate(poisson(rng, 200.0, 5.0))]
    fates = simulate(plan, places=6, service_s=0.1)
    assert len(fates.answered) == len(plan)


def mixed(load: float, seed: int) -> list[Request]:
    """Of 60 requests/s: a quarter in a hurry, a quarter at leisure, half without a deadline."""
    rng = random.Random(seed)
    plan = []
    for i, at in enumerate(poisson(rng, 60.0 * load, 20.0)):
        timeout_s = rng.choice([rng.uniform(0.5, 1.0), rng.uniform(2.0, 8.0), None, None])
        plan.append(request(f"r{i}", at, timeout_s=timeout_s))
    return plan


@pytest.mark.parametrize("seed", range(2))
def test_at_half_as_much_again_deadlines_are_missed_half_as_often_as_first_come_first_served(seed: int) -> None:
    plan = mixed(1.5, seed)
    dated = {one.request_id for one in plan if one.has_own_deadline}
    missed = {
        batching: len(dated - simulate(plan, places=6, service_s=0.1, batching=batching).answered.keys())
        for batching in (True, False)
    }
    assert missed[True] <= 0.5 * missed[False]


def modest_and_greedy(*, greedy: bool, seed: int = 3, timeout_s: float | None = None) -> list[Request]:
    """Of 200 requests/s four tenants ask for 60 % of their fifth each, and one for 20 times its own."""
    rng = random.Random(seed)
    plan = []
    for tenant in "abcd":
        times = list(poisson(rng, 24.0, 10.0))
        plan += [request(f"{tenant}{i}", at, tenant=tenant) for i, at in enumerate(times)]
    if greedy:
        times = list(poisson(rng, 800.0, 10.0))
        plan += [request(f"greedy{i}", at, tenant="greedy", timeout_s=timeout_s) for i, at in enumerate(times)]
    return plan


def modest_times(fates: Fates, plan: list[Request]) -> list[float]:
    accepted = {one.request_id: one.accepted_at for one in plan if one.tenant != "greedy" and one.accepted_at > 1.0}
    assert accepted.keys() <= fates.answered.keys(), "none of them is refused or late"
    return [fates.answered[name] - at for name, at in accepted.items()]


@pytest.mark.parametrize("timeout_s", [None, 1.0])
def test_a_greedy_tenant_costs_the_others_next_to_nothing(timeout_s: float | None) -> None:
    """Whether or not it claims to be in a hurry, and although it fills the backlog."""
    alone, beside = modest_and_greedy(greedy=False), modest_and_greedy(greedy=True, timeout_s=timeout_s)
    before = percentile(modest_times(simulate(alone, places=64, service_s=0.32), alone), 0.99)
    fates = simulate(beside, places=64, service_s=0.32, max_queued_tokens=20_000)
    after = percentile(modest_times(fates, beside), 0.99)
    assert after <= 1.2 * before
    assert len(fates.answered) >= 0.9 * 200 * 10, "what they leave is the greedy one's"


@pytest.mark.parametrize("seed", range(3))
def test_a_greedy_tenant_costs_the_others_little_from_its_first_second_on(seed: int) -> None:
    """It took all places before it was seen to have too much, and for as long as an answer takes every tenth request of
    the others waited for 100 ms and more."""
    calm = modest_and_greedy(greedy=False, seed=seed)
    rng = random.Random(seed)
    times = [3.0 + at for at in poisson(rng, 800.0, 2.0)]
    rush = [request(f"greedy{i}", at, tenant="greedy", timeout_s=5.0) for i, at in enumerate(times)]
    fates = simulate([*calm, *rush], places=64, service_s=0.32)
    waits = [fates.waits[one.request_id] for one in calm if 3.0 <= one.accepted_at < 4.0]
    assert percentile(waits, 0.9) <= 0.05
    assert len(fates.answered) - len(calm) >= 0.9 * 104 * 2, "what they leave is the greedy one's"


def test_a_full_backlog_is_shared() -> None:
    plan = [request(f"greedy{i}", 0.0, tenant="greedy") for i in range(200)]
    plan += [request(f"modest{i}", 0.1, tenant="modest") for i in range(20)]
    fates = simulate(plan, places=1, service_s=0.01, max_queued_tokens=100 * 16)
    assert all(name.startswith("greedy") for name in fates.refused)
    assert len(fates.answered) >= 100
    plain = simulate(plan, places=1, service_s=0.01, max_queued_tokens=30 * 16)
    assert sum(name.startswith("modest") for name in plain.refused) == 20 - 15, "no more than its part"


def test_old_evidence_does_not_lock_anybody_out() -> None:
    """Measured in a rush, an answer takes longer than any of these can wait; then the rush is over."""
    rush = [request(f"r{i}", 0.001 * i, timeout_s=5.0) for i in range(100)]
    later = [request(f"late{i}", 30.0 + i, timeout_s=0.05) for i in range(3)]
    fates = simulate([*rush, *later], places=5, service_s=0.1)
    assert not {"late0", "late1", "late2"} & fates.refused.keys(), "nobody knows yet that it cannot be done"
