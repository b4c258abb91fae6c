"""Which waiting requests go together because they begin alike, and at what cost in order and hashing."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from router.batcher import Batcher, DispatchBatch
from router.order import FairOrder
from router.placement import PromptHashes
from router.prefix_groups import PrefixGroups
from router.queued import Queued
from tests.router_back.made_requests import make_queued

SIZE = 4


class CountingHashes(PromptHashes):
    """Counts how often it is asked."""

    num_asked = 0

    def of(self, block_size: int) -> list[bytes]:
        CountingHashes.num_asked += 1
        return super().of(block_size)


def queued(
    key: int, prompt: Sequence[int], *, salt: bytes = b"", tenant: str = "", latest_start: float = math.inf
) -> Queued:
    waiting = make_queued(key, prompt, latest_start=latest_start, salt=salt, tenant=tenant)
    return replace(waiting, hashes=CountingHashes(b"key", waiting.request))


def alike(key: int, prefix: int, own: int = 4, **fields: Any) -> Queued:
    """A prompt of 16 shared and `own` tokens of its own."""
    return queued(key, [*range(prefix * 100, prefix * 100 + 16), *range(key * 1000, key * 1000 + own)], **fields)


def make_batcher(*waiting: Queued, tokens: int = 1_000, requests: int = 8) -> Batcher:
    batcher = Batcher(FairOrder(), max_batch_tokens=tokens, max_batch_requests=requests, max_batch_wait_s=0.0)
    for one in waiting:
        batcher.add(one)
    return batcher


def groups(batch: DispatchBatch | None) -> list[list[int]]:
    return [[one.key for one in group] for group in batch.groups] if batch else []


def test_those_that_begin_alike_go_together_with_the_first_of_them() -> None:
    batcher = make_batcher(alike(1, 1), alike(2, 2), alike(3, 1), alike(4, 3), alike(5, 2))
    batch = batcher.next_batch(0.0, 1_000, block_size=SIZE)
    assert groups(batch) == [[1, 3], [2, 5], [4]]
    assert batch is not None
    assert batch.num_tokens == 3 * 20 + 2 * 4, "what is shared counts once"
    batcher.check_integrity()


def test_a_rider_shares_at_least_the_first_half_of_its_blocks() -> None:
    batcher = make_batcher(alike(1, 1), alike(2, 2), alike(3, 1, own=12), alike(4, 1, own=24))
    assert groups(batcher.next_batch(0.0, 1_000, block_size=SIZE)) == [[1, 3], [2], [4]]


def test_a_group_keeps_to_the_budget() -> None:
    waiting = [alike(i, 1) for i in range(6)]
    assert groups(make_batcher(*waiting, tokens=30).next_batch(0.0, 1_000, block_size=SIZE)) == [[0, 1, 2]]
    assert groups(make_batcher(*waiting, requests=2).next_batch(0.0, 1_000, block_size=SIZE)) == [[0, 1]]
    places = make_batcher(*waiting).next_batch(0.0, 1_000, credit_sequences=4, block_size=SIZE)
    assert groups(places) == [[0, 1, 2, 3]]
    # The replica lacks credit for so many prompts, but not for what they do not share.
    assert groups(make_batcher(*waiting).next_batch(0.0, 10, block_size=SIZE)) == [[0, 1, 2, 3, 4, 5]]


def test_nobody_rides_over_priorities_tenants_and_salts() -> None:
    other = alike(3, 1)
    urgent = Queued(
        key=9,
        request=replace(other.request, priority=-1),
        since=0.0,
        cost=1,
        hashes=other.hashes,
    )
    batcher = make_batcher(alike(1, 1), alike(2, 1, tenant="b"), urgent, alike(4, 1, salt=b"s"))
    together = groups(batcher.next_batch(0.0, 1_000, block_size=SIZE))
    assert all(len(group) == 1 for group in together)


def test_who_presses_is_not_pushed_back_by_riders() -> None:
    riders = [alike(i, 1) for i in range(4)]
    batcher = make_batcher(*riders, alike(10, 2, latest_start=0.1), alike(11, 3, latest_start=0.2))
    batch = batcher.next_batch(0.0, 1_000, credit_sequences=3, block_size=SIZE)
    assert groups(batch) == [[10], [11], [0]]


def test_a_single_request_is_not_hashed() -> None:
    """At low load the queue costs next to nothing."""
    CountingHashes.num_asked = 0
    for i in range(5):
        batcher = make_batcher(alike(i, 1))
        assert groups(batcher.next_batch(0.0, 1_000, block_size=SIZE)) == [[i]]
    assert CountingHashes.num_asked == 0


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_left_behind(seed: int) -> None:
    rng = random.Random(seed)
    index = PrefixGroups()
    waiting: dict[int, Queued] = {}
    for key in range(60):
        one = queued(key, [rng.randrange(2) for _ in range(rng.randrange(1, 24))])
        waiting[key] = one
        index.add(one)
        if rng.random() < 0.5:
            gone = waiting.pop(rng.choice(list(waiting)))
            index.remove(gone)
            size = rng.choice([SIZE, SIZE, 2])
            for rider, num_shared in index.companions(gone, size):
                assert rider.key in waiting
                assert rider.request.prompt[:num_shared] == gone.request.prompt[:num_shared]
                assert 2 * num_shared >= rider.num_tokens // size * size
        index.check_integrity(waiting)
    for one in waiting.values():
        index.remove(one)
    index.check_integrity({})
    assert not index._halves
