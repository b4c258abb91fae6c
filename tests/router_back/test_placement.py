"""Where a request goes, and why."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from router.placement import MAX_CANDIDATES, LeastCost, PromptHashes, replay
from router.prefix_index import count_matched
from router.roster import DECODE_TOKENS, Roster
from router.types import Decision, Request
from workers.prefix import PrefixHasher
from workers.types import SamplingParams

KEY = b"key"


@dataclass
class Replica:
    """A hand-made `Placeable`. `resident` is in the roster's index once it has joined; `pending` is expected."""

    replica: str
    owed_tokens: int = 0
    num_running: int = 0
    credit_tokens: int = 100
    credit_sequences: int = 10
    cache_use: float = 0.0
    block_size: int = 4
    resident: dict[bytes, None] = field(default_factory=dict)
    pending: list[bytes] = field(default_factory=list)
    capabilities: frozenset[str] = frozenset()
    is_open: bool = True

    def holds(self, prompt: list[int], num_blocks: int, salt: bytes = b"") -> Replica:
        hasher = PrefixHasher(KEY, self.block_size)
        self.resident.update(dict.fromkeys(hasher.blocks(hasher.root(salt), prompt)[:num_blocks]))
        return self

    def expects(self, prompt: list[int]) -> Replica:
        hasher = PrefixHasher(KEY, self.block_size)
        self.pending += [name for name in hasher.blocks(hasher.root(), prompt) if name not in self.resident]
        return self


def make_request(prompt: list[int], *, affinity_key: str = "", salt: bytes = b"") -> Request:
    return Request(
        request_id="r",
        model="fake",
        prompt=prompt,
        sampling=SamplingParams(),
        max_tokens=1,
        deadline=1.0,
        accepted_at=0.0,
        affinity_key=affinity_key,
        salt=salt,
    )


def make_roster(*replicas: Replica) -> Roster:
    roster = Roster()
    for replica in replicas:
        slot = roster.join(replica)
        roster.index.store(slot, replica.resident)
        roster.index.expect(slot, replica.pending)
    roster.check_integrity()
    return roster


def place(*replicas: Replica, prompt: list[int] | None = None, seed: int = 1, **fields: object) -> Decision | None:
    request = make_request(prompt or list(range(10)), **fields)  # type: ignore[arg-type]
    decision = LeastCost(random.Random(seed)).place(request, PromptHashes(KEY, request), make_roster(*replicas))
    if decision is not None:
        assert replay(decision, request.affinity_key) == (decision.replica, decision.rule)
    return decision


def chosen(*replicas: Replica, **fields: object) -> str:
    decision = place(*replicas, **fields)  # type: ignore[arg-type]
    assert decision is not None
    return decision.replica


def test_the_least_loaded_in_tokens_and_not_in_requests_is_chosen() -> None:
    """One long prompt weighs more than several short ones (llm-d-router#1977, smg#1621)."""
    long, short = Replica("long", owed_tokens=5_000, num_running=1), Replica("short", owed_tokens=50, num_running=3)
    decision = place(long, short)
    assert decision is not None
    assert (decision.replica, decision.rule, decision.attempt) == ("short", "least_loaded", 1)
    assert [candidate.replica for candidate in decision.candidates] == ["short", "long"]
    best = decision.candidates[0]
    assert (best.owed_tokens, best.uncached_tokens, best.decode_tokens) == (50.0, 10.0, 3 * DECODE_TOKENS)
    assert best.cost == 60 + 3 * DECODE_TOKENS


def test_the_only_one_and_nobody() -> None:
    decision = place(Replica("full", credit_tokens=0), Replica("free"), Replica("over", credit_tokens=-3))
    assert decision is not None
    assert (decision.replica, decision.rule) == ("free", "only")
    assert len(decision.candidates) == 1
    assert place(Replica("full", credit_tokens=0)) is None
    assert place() is None


def test_ties_are_spread() -> None:
    """A fixed tie-break sends every router to the same replica (llm-d-router#2515)."""
    placement = LeastCost(random.Random(3))
    request = make_request([1, 2, 3])
    roster = make_roster(*(Replica(name) for name in "abcd"))
    counts = Counter[str]()
    for _ in range(400):
        decision = placement.place(request, PromptHashes(KEY, request), roster)
        assert decision is not None
        counts[decision.replica] += 1
    assert all(60 <= counts[name] <= 140 for name in "abcd")


def test_what_is_cached_need_not_be_computed() -> None:
    prompt = list(range(40))
    warm, cold = Replica("warm", owed_tokens=20).holds(prompt, 8), Replica("cold")
    decision = place(warm, cold, prompt=prompt)
    assert decision is not None
    assert (decision.replica, decision.rule, decision.matched_tokens) == ("warm", "prefix", 32)
    assert [c.uncached_tokens for c in decision.candidates] == [8.0, 40.0]


def test_a_cold_replica_takes_over_before_a_hot_one_queues() -> None:
    prompt = list(range(40))
    warm, cold = Replica("warm", owed_tokens=100).holds(prompt, 8), Replica("cold")
    decision = place(warm, cold, prompt=prompt)
    assert decision is not None
    assert (decision.replica, decision.rule, decision.matched_tokens) == ("cold", "least_loaded", 0)


def test_what_everybody_has_cached_decides_nothing() -> None:
    prompt = list(range(40))
    decision = place(Replica("a").holds(prompt, 8), Replica("b", owed_tokens=1).holds(prompt, 8), prompt=prompt)
    assert decision is not None
    assert (decision.replica, decision.rule, decision.matched_tokens) == ("a", "least_loaded", 32)


def test_the_last_token_is_always_computed() -> None:
    prompt = list(range(8))
    decision = place(Replica("warm").holds(prompt, 2), prompt=prompt)
    assert decision is not None
    assert decision.matched_tokens == 4


def test_only_a_run_from_the_beginning_matches() -> None:
    assert count_matched([b"a", b"b", b"c"], {b"a", b"c"}) == 1
    assert count_matched([b"a", b"b"], {b"a", b"b"}) == 2
    assert count_matched([], {b"a"}) == 0


def test_another_tenants_blocks_do_not_match() -> None:
    prompt = list(range(40))
    decision = place(Replica("warm").holds(prompt, 8, salt=b"one"), prompt=prompt, salt=b"two")
    assert decision is not None
    assert decision.matched_tokens == 0


def test_replicas_may_differ_in_block_size() -> None:
    prompt = list(range(40))
    small, large = Replica("small").holds(prompt, 5), Replica("large", block_size=16).holds(prompt, 2)
    decision = place(small, large, prompt=prompt)
    assert decision is not None
    assert (decision.replica, decision.matched_tokens) == ("large", 32)


def test_affinity_decides_ties_only_and_always_in_the_same_way() -> None:
    replicas = [Replica(name) for name in "abcdefgh"]
    homes = {key: chosen(*replicas, affinity_key=key) for key in "uvwxyz"}
    assert len(set(homes.values())) > 1
    for seed in range(5):
        assert {key: chosen(*replicas, affinity_key=key, seed=seed) for key in homes} == homes
    decision = place(*replicas, affinity_key="u")
    assert decision is not None
    assert decision.rule == "affinity"
    loaded = [Replica(r.replica, owed_tokens=int(r.replica == homes["u"])) for r in replicas]
    assert chosen(*loaded, affinity_key="u") != homes["u"]


def test_few_keys_move_when_a_replica_leaves() -> None:
    replicas = [Replica(name) for name in "abcdefgh"]
    homes = {str(key): chosen(*replicas, affinity_key=str(key)) for key in range(50)}
    for key, home in homes.items():
        if home != "h":
            assert chosen(*replicas[:-1], affinity_key=key) == home


def test_a_decision_carries_the_cheapest_candidates_only() -> None:
    decision = place(*(Replica(str(i), owed_tokens=i) for i in range(50)))
    assert decision is not None
    assert [candidate.replica for candidate in decision.candidates] == [str(i) for i in range(MAX_CANDIDATES)]


@given(
    st.lists(
        st.tuples(st.integers(0, 50), st.integers(0, 4), st.integers(-5, 50), st.integers(0, 6)), min_size=0, max_size=6
    ),
    st.lists(st.integers(0, 1), min_size=1, max_size=24),
    st.sampled_from(["", "key"]),
    st.integers(0, 3),
)
def test_the_choice_is_among_the_cheapest_of_those_with_credit(
    loads: list[tuple[int, int, int, int]], prompt: list[int], affinity_key: str, seed: int
) -> None:
    replicas = [
        Replica(str(i), owed_tokens=owed, num_running=running, credit_tokens=credit).holds(prompt, blocks)
        for i, (owed, running, credit, blocks) in enumerate(loads)
    ]
    decision = place(*replicas, prompt=prompt, affinity_key=affinity_key, seed=seed)
    able = {replica.replica: replica for replica in replicas if replica.credit_tokens > 0}
    if decision is None:
        assert not able
        return
    costs = {}
    for name, replica in able.items():
        hasher = PrefixHasher(KEY, 4)
        matched = 4 * count_matched(hasher.blocks(hasher.root(), prompt), replica.resident)
        uncached = max(len(prompt) - matched, (len(prompt) - 1) % 4 + 1)
        costs[name] = replica.owed_tokens + uncached + DECODE_TOKENS * replica.num_running
    assert costs[decision.replica] == min(costs.values())
    assert {candidate.replica: candidate.cost for candidate in decision.candidates} == costs
    assert decision.rule in {"only", "affinity", "prefix", "least_loaded"}
    assert (decision.rule == "only") == (len(able) == 1)
