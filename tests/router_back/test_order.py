"""Who goes first: priorities, deadlines that press, tenants in turn. And that it stays so whatever happens."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.order import ArrivalOrder, FairOrder
from router.priority_class import ADVANCE_S
from router.queued import Queued
from router.tenant_queue import JUMPS
from tests.router_back.made_requests import make_queued


def queued(
    key: int,
    tenant: str = "",
    *,
    cost: int = 10,
    latest_start: float = math.inf,
    priority: int = 0,
    accepted_at: float | None = None,
) -> Queued:
    return make_queued(
        key,
        range(cost),
        cost=cost,
        latest_start=latest_start,
        tenant=tenant,
        priority=priority,
        accepted_at=float(key) if accepted_at is None else accepted_at,
    )


class Queue:
    """An order whose backlog lasts since 0 and whose replicas take `rate` tokens per second."""

    def __init__(self, *waiting: Queued, rate: float = 100.0) -> None:
        self.order = FairOrder()
        self.rate = rate
        self.now = 0.0
        for one in waiting:
            self.add(one)

    def add(self, one: Queued) -> None:
        self.order.add(one, self.now)

    def go(self) -> Queued:
        """Let the next one go, and the time pass that replicas need for it."""
        one = self.order.next(self.now, self.now, num_free=9, is_held=True)
        assert one is not None
        self.now += one.cost / self.rate
        self.order.take(one, self.now, is_held=True)
        self.order.check_integrity()
        return one

    def keys(self, count: int) -> list[int]:
        return [self.go().key for _ in range(count)]


def test_priority_comes_first_then_arrival() -> None:
    queue = Queue(queued(1), queued(2, priority=-1), queued(3, priority=1), queued(4, priority=-1))
    assert queue.keys(4) == [2, 4, 1, 3]


def test_tenants_go_in_turn_by_tokens_not_by_requests() -> None:
    """20 requests of 10 tokens wait beside 20 of 40: in the same time the first tenant gets four times as many."""
    small = [queued(i, "small", cost=10) for i in range(20)]
    large = [queued(100 + i, "large", cost=40) for i in range(20)]
    queue = Queue(*large, *small)
    gone = Counter(queue.go().request.tenant for _ in range(20))
    assert gone == {"small": 16, "large": 4}


def test_a_tenant_that_was_away_goes_first_but_has_saved_nothing_up() -> None:
    queue = Queue(*(queued(i, "busy") for i in range(50)))
    queue.keys(30)
    for i in range(100, 120):
        queue.add(queued(i, "back"))
    tenants = [queue.go().request.tenant for _ in range(12)]
    assert tenants[0] == "back"
    assert Counter(tenants) == {"back": 6, "busy": 6}


def test_who_presses_goes_before_who_came_earlier() -> None:
    queue = Queue(*(queued(i) for i in range(20)))
    queue.keys(2)
    queue.add(queued(50, latest_start=queue.now + 0.5))
    queue.add(queued(51, latest_start=queue.now + 0.2))
    queue.add(queued(52, latest_start=queue.now + 1_000.0))
    assert queue.keys(4) == [51, 50, 2, 3], "a far deadline is no reason to go first"


def test_deadlines_do_not_starve_those_without() -> None:
    queue = Queue(queued(1))
    for i in range(100):
        queue.add(queued(10 + i, latest_start=0.001 * i))
    gone = queue.keys(JUMPS + 1)
    assert gone.index(1) == JUMPS


def test_deadlines_bring_a_greedy_tenant_no_more_than_its_share() -> None:
    """All of its requests press. It is ahead by a quarter of a second of everybody's throughput, once, and no more."""
    queue = Queue(rate=1_000.0)
    for i in range(1_000):
        queue.add(queued(i, "greedy", latest_start=0.001))
        queue.add(queued(10_000 + i, "modest"))
    gone = Counter(queue.go().request.tenant for _ in range(1_000))
    assert gone["greedy"] - gone["modest"] <= 2 * (ADVANCE_S * 1_000.0 / 10 + 2)
    later = Counter(queue.go().request.tenant for _ in range(400))
    assert abs(later["greedy"] - later["modest"]) <= 4


def test_a_pressing_request_of_a_modest_tenant_goes_out_of_turn() -> None:
    queue = Queue(rate=1_000.0)
    for i in range(500):
        for tenant in ("a", "b", "c", "d"):
            queue.add(queued(1_000 * ord(tenant) + i, tenant))
    for _ in range(101):
        queue.go()
    ahead = max(("a", "b", "c", "d"), key=lambda name: queue.order._classes[0]._tenants[name].clock)
    queue.add(queued(7, ahead, latest_start=queue.now + 0.001))
    assert queue.go().key == 7


def test_what_a_tenant_was_charged_is_corrected() -> None:
    """Its answers turn out to be as short as those of the others, whatever max_tokens it asks for."""
    queue = Queue()
    for i in range(100):
        queue.add(queued(i, "asks", cost=100))
        queue.add(queued(1_000 + i, "plain", cost=10))
    gone: Counter[str] = Counter()
    for _ in range(40):
        one = queue.go()
        gone[one.request.tenant] += 1
        queue.order.settle(0, one.request.tenant, 10 - one.cost)
    assert abs(gone["asks"] - gone["plain"]) <= 2


def test_how_late_one_more_would_be() -> None:
    queue = Queue(*(queued(i) for i in range(20)))
    queue.keys(20)
    assert queue.order.shortfall_s(0, "", 10, queue.now, queue.now, queue.now) == 0.0, "nothing waits"
    for i in range(100, 110):
        queue.add(queued(i, latest_start=queue.now + 1.5))

    def shortfall(in_s: float, cost: int = 10) -> float:
        return queue.order.shortfall_s(0, "", cost, queue.now + in_s, queue.now, queue.now)

    assert shortfall(3.0) <= 0.0
    assert shortfall(0.5) <= 0.0, "it goes before the others, who can wait"
    assert shortfall(0.5, cost=100) > 0.0, "then they could not"
    for i in range(110, 120):
        queue.add(queued(i, latest_start=queue.now + 1.9))
    assert shortfall(1.95) == pytest.approx(0.05, abs=0.11)
    assert shortfall(20.0) <= 0.0


def test_first_come_first_served() -> None:
    order = ArrivalOrder()
    for one in (queued(1, priority=5, accepted_at=1.0), queued(2, priority=-5, latest_start=0.0, accepted_at=2.0)):
        order.add(one, 0.0)
    first = order.next(0.0, 0.0, num_free=9, is_held=True)
    assert first is not None
    assert first.key == 1
    order.take(first, 0.0, is_held=True)
    order.check_integrity()


class OrderMachine(RuleBasedStateMachine):
    """Few tenants, priorities and slacks, at random: nobody is lost, no class is passed over, shares are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.order = FairOrder()
        self.waiting: dict[int, Queued] = {}
        self.now = 0.0
        self.next_key = 0

    @rule(
        tenant=st.sampled_from("abc"),
        cost=st.integers(1, 30),
        priority=st.integers(-1, 1),
        slack=st.sampled_from([math.inf, 0.1, 5.0, 100.0]),
    )
    def add(self, tenant: str, cost: int, priority: int, slack: float) -> None:
        self.next_key += 1
        one = queued(self.next_key, tenant, cost=cost, priority=priority, latest_start=self.now + slack)
        self.waiting[one.key] = one
        self.order.add(one, self.now)

    @rule(by=st.sampled_from([0.01, 0.3, 3.0]))
    def pass_time(self, by: float) -> None:
        self.now += by

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.order.remove(self.waiting.pop(data.draw(st.sampled_from(sorted(self.waiting)))), self.now)

    @rule(count=st.integers(1, 5), is_held=st.booleans())
    def go(self, count: int, is_held: bool) -> None:
        for _ in range(count):
            one = self.order.next(self.now, self.now, num_free=9, is_held=True)
            assert (one is None) == (not self.waiting)
            if one is None:
                return
            assert one.request.priority == min(q.request.priority for q in self.waiting.values())
            rivals = [q for q in self.waiting.values() if _side(q) == _side(one)]
            if one.latest_start == math.inf:
                undated = [q for q in rivals if q.latest_start == math.inf]
                assert one.key == min(q.key for q in undated)
            assert self.waiting.pop(one.key) is one
            self.order.take(one, self.now, is_held=is_held)

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(-1, 1), by=st.integers(-20, 20))
    def settle(self, tenant: str, priority: int, by: int) -> None:
        if priority in self.order._classes:
            self.order.settle(priority, tenant, by)

    @invariant()
    def agrees(self) -> None:
        self.order.check_integrity()
        known = self.order._classes.values()
        assert sum(len(t) for each in known for t in each._tenants.values()) == len(self.waiting)


def _side(one: Queued) -> tuple[int, str]:
    return one.request.priority, one.request.tenant


OrderMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestOrderMachine = OrderMachine.TestCase


@pytest.mark.parametrize("seed", range(2))
def test_shares_are_equal_while_all_have_something_waiting(seed: int) -> None:
    rng = random.Random(seed)
    queue = Queue(rate=1_000.0)
    tenants = ["a", "b", "c", "d", "e"]
    for i in range(3_000):
        slack = rng.choice([math.inf, math.inf, 0.5, 5.0])
        queue.add(queued(i, rng.choice(tenants), cost=rng.randint(1, 60), latest_start=slack))
    tokens: Counter[str] = Counter()
    for _ in range(1_000):
        one = queue.go()
        tokens[one.request.tenant] += one.cost
    assert max(tokens.values()) - min(tokens.values()) <= ADVANCE_S * 1_000.0 + 2 * 60
