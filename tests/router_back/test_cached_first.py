"""Which requests go before their turn because a replica has their beginning already, and what that may cost others."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from router.batcher import MAX_PASSES, MAX_SEEN, Batcher
from router.order import ArrivalOrder, FairOrder
from router.placement import PromptHashes
from router.queued import Queued
from router.types import Request
from tests.router_back.cache_simulation import Answers, simulate
from tests.router_back.made_requests import make_queued, make_request
from tests.router_back.queue_simulation import percentile, poisson

SIZE = 4


def hashed(waiting: Queued) -> Queued:
    return replace(waiting, hashes=PromptHashes(b"key", waiting.request))


def queued(key: int, prefix: int, **fields: Any) -> Queued:
    """A prompt of 16 tokens shared by all with this prefix, and four of its own."""
    prompt = [*range(prefix * 100, prefix * 100 + 16), *range(key * 1_000, key * 1_000 + 4)]
    return hashed(make_queued(key, prompt, **fields))


def caches_with(*prefixes: int) -> Callable[[bytes], bool]:
    """What replicas say that have these."""
    requests = (queued(0, prefix).request for prefix in prefixes)
    known = {block for request in requests for block in PromptHashes(b"key", request).of(SIZE)[:4]}
    return known.__contains__


def make_batcher(
    *waiting: Queued, order: FairOrder | ArrivalOrder | None = None, tokens: int = 1_000, requests: int = 1
) -> Batcher:
    batcher = Batcher(order or FairOrder(), max_batch_tokens=tokens, max_batch_requests=requests, max_batch_wait_s=0.0)
    for one in waiting:
        batcher.add(one)
    return batcher


def next_key(batcher: Batcher, at_hand: Callable[[bytes], bool]) -> int:
    batch = batcher.next_batch(0.0, 1_000, block_size=SIZE, at_hand=at_hand)
    batcher.check_integrity()
    assert batch is not None
    return batch.groups[0][0].key


def keys(batcher: Batcher, at_hand: Callable[[bytes], bool]) -> list[int]:
    return [next_key(batcher, at_hand) for _ in range(batcher.num_requests)]


def test_what_is_cached_goes_before_what_would_take_its_place() -> None:
    waiting = [queued(1, 1), queued(2, 2), queued(3, 3), queued(4, 2)]
    assert keys(make_batcher(*waiting), caches_with(2)) == [2, 4, 1, 3]
    assert keys(make_batcher(*waiting), caches_with(1)) == [1, 2, 3, 4]
    assert keys(make_batcher(*waiting), caches_with()) == [1, 2, 3, 4]


def test_a_prompt_that_is_shorter_than_a_block_waits_for_nobody() -> None:
    assert keys(make_batcher(hashed(make_queued(1, [1, 2])), queued(2, 2)), caches_with(2)) == [1, 2]


def test_nobody_is_passed_without_end() -> None:
    """Others come with what is cached, for ever."""
    batcher = make_batcher(queued(1, 1), queued(2, 2), *(queued(i, 3) for i in range(3, 8)))
    went = []
    for key in range(8, 60):
        went.append(next_key(batcher, caches_with(3)))
        batcher.add(queued(key, 3))
    assert went.index(1) == MAX_PASSES
    assert went.index(2) == MAX_PASSES + 1, "it was passed as often"


def test_who_does_not_fit_into_the_batch_has_passed_nobody() -> None:
    """At the end of each batch one more was counted than went, and half as many as may went before the others."""
    waiting = [queued(key, key) for key in range(1, 30)]
    went = keys(make_batcher(*waiting, tokens=30, requests=8), caches_with(*range(2, 30)))
    assert went.index(1) == MAX_PASSES


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_passed_by_more_than_that(seed: int) -> None:
    rng = random.Random(seed)
    batcher, arrivals, passed = make_batcher(), list[int](), dict[int, int]()
    for key in range(1, 400):
        if not arrivals or rng.random() < 0.6:
            batcher.add(queued(key, rng.randrange(8)))
            arrivals.append(key)
        else:
            gone = next_key(batcher, caches_with(*rng.sample(range(8), 2)))
            for before in arrivals[: arrivals.index(gone)]:
                passed[before] = passed.get(before, 0) + 1
            arrivals.remove(gone)
    assert MAX_PASSES // 2 < max(passed.values()) <= MAX_PASSES


def test_only_the_oldest_are_looked_at() -> None:
    waiting = [queued(i, i) for i in range(1, MAX_SEEN + 2)]
    assert next_key(make_batcher(*waiting), caches_with(MAX_SEEN)) == MAX_SEEN
    assert next_key(make_batcher(*waiting), caches_with(MAX_SEEN + 1)) == 1


def test_a_tenants_turn_is_its_own_and_so_is_a_priority() -> None:
    batcher = make_batcher(queued(1, 1, tenant="a"), queued(2, 2, tenant="b"), queued(3, 3, tenant="a"))
    assert next_key(batcher, caches_with(2)) == 1
    batcher = make_batcher(queued(1, 1, tenant="a"), queued(2, 2, tenant="b"), queued(3, 3, tenant="a"))
    assert keys(batcher, caches_with(3)) == [3, 2, 1], "who goes is charged for it"
    batcher = make_batcher(queued(1, 1, priority=-1), queued(2, 2), queued(3, 3, priority=-1))
    assert keys(batcher, caches_with(2)) == [1, 3, 2]


def test_while_a_deadline_presses_nobody_is_passed() -> None:
    pressing = [queued(1, 1, latest_start=0.1), queued(2, 2)]
    assert keys(make_batcher(*pressing), caches_with(2)) == [1, 2]


def test_who_could_not_be_in_time_passes_nobody() -> None:
    assert next_key(make_batcher(queued(1, 1), queued(2, 2, deadline=0.0)), caches_with(2)) == 1


def test_first_come_first_served_is_just_that() -> None:
    waiting = [queued(1, 1), queued(2, 2), queued(3, 3)]
    assert keys(make_batcher(*waiting, order=ArrivalOrder()), caches_with(2, 3)) == [1, 2, 3]


def sixteen_prefixes(rate: float, duration_s: float, seed: int) -> list[Request]:
    """512 shared tokens and 16 of their own, as in load_tests/rigs/router_batching.py."""
    rng = random.Random(seed)
    prefixes = [rng.choices(range(300, 30_000), k=512) for _ in range(16)]
    return [
        make_request(
            [*rng.choice(prefixes), *rng.choices(range(300, 30_000), k=16)],
            request_id=f"r{number}",
            max_tokens=8,
            deadline=at + 600.0,
            accepted_at=at,
        )
        for number, at in enumerate(poisson(rng, rate, duration_s))
    ]


def computed(answers: Answers, plan: list[Request]) -> int:
    return sum(len(one.prompt) for one in plan) - answers.num_cached


def test_caches_that_cannot_hold_all_prefixes_are_used_before_they_are_overwritten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At 0.9 x what is answered so, twice what first come, first served answers; see load_tests/rigs/router_batching.py
    for what that is. Grouping alone computed twice as much, as places become free one by one, too few for a group."""
    plan = sixteen_prefixes(150.0, 3.0, seed=1)
    caches = {"num_blocks": 256, "max_num_sequences": 16}
    cached_first = simulate(plan, **caches)
    arrival = simulate(plan, batching=False, **caches)
    monkeypatch.setattr("router.batcher.MAX_PASSES", 0)
    grouped = simulate(plan, **caches)
    assert 1.6 * computed(cached_first, plan) <= computed(grouped, plan)
    assert 2.0 * computed(cached_first, plan) <= computed(arrival, plan)
    assert percentile(cached_first.first_s.values(), 0.99) <= percentile(grouped.first_s.values(), 0.99)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_while_first_come_first_served_keeps_up_nobody_waits_longer_than_with_it(seed: int) -> None:
    """There is next to no queue to choose from."""
    plan = sixteen_prefixes(73.0, 5.0, seed=seed)
    caches = {"num_blocks": 256, "max_num_sequences": 16}
    cached_first, arrival = simulate(plan, **caches), simulate(plan, batching=False, **caches)
    assert percentile(cached_first.first_s.values(), 0.99) <= percentile(arrival.first_s.values(), 0.99)
