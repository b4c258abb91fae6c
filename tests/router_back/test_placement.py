"""Where a request goes, and why."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from router.affinity import favourite
from router.placement import MAX_CANDIDATES, LeastCost, PromptHashes, replay
from router.prefix_index import count_matched, slots_of
from router.roster import DECODE_TOKENS, DISPLACED_TOKENS, Roster, load_of
from router.types import Decision
from tests.router_back.made_requests import make_request
from workers.prefix import PrefixHasher

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


def make_roster(*replicas: Replica) -> Roster:
    roster = Roster()
    for replica in replicas:
        slot = roster.join(replica)
        roster.index.store(slot, replica.resident)
        roster.index.expect(slot, replica.pending)
    roster.check_integrity()
    return roster


def place(*replicas: Replica, prompt: list[int] | None = None, seed: int = 1, **fields: Any) -> Decision | None:
    request = make_request(prompt or list(range(10)), **fields)
    decision = LeastCost(random.Random(seed)).place(request, PromptHashes(KEY, request), make_roster(*replicas))
    if decision is not None:
        assert replay(decision, request.affinity_key) == (decision.replica, decision.rule)
    return decision


def chosen(*replicas: Replica, **fields: Any) -> str:
    decision = place(*replicas, **fields)
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


def test_what_is_being_computed_counts_as_cached_and_is_owed_to_nobody_else() -> None:
    prompt = list(range(40))
    home = Replica("home", owed_tokens=40, credit_tokens=-10).expects(prompt)
    decision = place(home, Replica("cold"), prompt=prompt)
    assert decision is not None
    assert (decision.replica, decision.rule, decision.matched_tokens) == ("home", "prefix", 36)
    assert [(c.owed_tokens, c.uncached_tokens) for c in decision.candidates] == [(4.0, 4.0), (0.0, 76.0)]


def test_a_burst_spreads_once_the_rest_that_is_owed_costs_more_than_the_prefix_twice() -> None:
    prompt = list(range(40))
    for others, expected in ((71, "home"), (73, "cold")):
        home = Replica("home", owed_tokens=36 + others, credit_tokens=-10).expects(prompt)
        assert chosen(home, Replica("cold"), prompt=prompt) == expected


def test_a_replica_without_places_gets_no_burst_either() -> None:
    prompt = list(range(40))
    home = Replica("home", credit_tokens=0, credit_sequences=0).expects(prompt)
    assert chosen(home, Replica("cold", owed_tokens=500), prompt=prompt) == "cold"
    assert place(home, prompt=prompt) is None


def test_new_prefixes_go_where_there_is_room() -> None:
    full, half = Replica("full", cache_use=1.0), Replica("half", cache_use=0.5, num_running=7)
    assert chosen(full, half) == "half"
    assert chosen(full, Replica("half", cache_use=0.5, num_running=9)) == "full"


def test_one_hot_replica_does_not_switch_affinity_off_for_the_others() -> None:
    """A peer compared the largest with the smallest load, and with one outlier balanced all requests (sglang#32195)."""
    prompts = {name: [seed] * 40 for seed, name in enumerate("abc")}
    replicas = [Replica(name).holds(prompt, 8) for name, prompt in prompts.items()]
    replicas[0].owed_tokens = 100_000
    assert chosen(*replicas, prompt=prompts["b"]) == "b"
    assert chosen(*replicas, prompt=prompts["c"]) == "c"


def test_a_new_empty_replica_does_not_get_everything() -> None:
    """What is sent counts at once, before anything is reported."""
    replicas = [Replica("old", owed_tokens=300), Replica("new", credit_tokens=10_000)]
    roster = make_roster(*replicas)
    placement = LeastCost(random.Random(1))
    counts = Counter[str]()
    for number in range(40):
        request = make_request([number] * 30)
        decision = placement.place(request, PromptHashes(KEY, request), roster)
        assert decision is not None
        counts[decision.replica] += 1
        slot = [replica.replica for replica in replicas].index(decision.replica)
        replicas[slot].owed_tokens += 30
        roster.changed(slot)
    assert 14 <= counts["old"] <= 16


def test_ties_among_many_are_spread_evenly() -> None:
    roster = make_roster(*(Replica(str(number)) for number in range(100)))
    placement = LeastCost(random.Random(3))
    counts = Counter[str]()
    for number in range(4_000):
        request = make_request([number])
        decision = placement.place(request, PromptHashes(KEY, request), roster)
        assert decision is not None
        counts[decision.replica] += 1
    assert len(counts) == 100
    assert max(counts.values()) < 80


def test_a_prompt_is_hashed_once_for_each_block_size() -> None:
    request = make_request(list(range(1_000)))
    hashes = PromptHashes(KEY, request)
    for size in (4, 16):
        hasher = PrefixHasher(KEY, size)
        assert hashes.of(size) == hasher.blocks(hasher.root(), request.prompt)
        assert hashes.of(size) is hashes.of(size)


LOAD = st.tuples(
    st.integers(0, 60),  # owed
    st.integers(0, 4),  # running
    st.integers(-40, 50),  # credit
    st.integers(0, 6),  # blocks that it has
    st.booleans(),  # whether it computes the rest
    st.sampled_from([0.0, 0.5, 1.0]),  # cache use
    st.sampled_from([4, 4, 4, 6]),  # block size
)


@given(
    st.lists(LOAD, max_size=6),
    st.integers(0, 40),
    st.lists(st.integers(0, 1), min_size=1, max_size=24),
    st.sampled_from(["", "key"]),
    st.integers(0, 3),
)
def test_the_choice_is_what_a_look_at_every_replica_would_choose(
    loads: list[tuple[int, int, int, int, bool, float, int]],
    num_more: int,
    prompt: list[int],
    affinity_key: str,
    seed: int,
) -> None:
    replicas = []
    for i, (owed, running, credit, blocks, computes, use, size) in enumerate(loads):
        replica = Replica(
            str(i), owed_tokens=owed, num_running=running, credit_tokens=credit, block_size=size, cache_use=use
        ).holds(prompt, blocks)
        replicas.append(replica.expects(prompt) if computes else replica)
    # So many that they are not looked at one by one, with loads of which some are alike.
    replicas += [Replica(f"more-{i}", owed_tokens=30 + i % 7).holds(prompt, i % 3) for i in range(num_more)]
    decision = place(*replicas, prompt=prompt, affinity_key=affinity_key, seed=seed)
    costs = brute_costs(replicas, prompt)
    if decision is None:
        assert not costs
        return
    least = min(costs.values())
    assert costs[decision.replica] == least
    listed = {candidate.replica: candidate.cost for candidate in decision.candidates}
    assert listed == {name: costs[name] for name in listed}
    assert sorted(listed.values()) == sorted(costs.values())[:MAX_CANDIDATES]
    assert (decision.rule == "only") == (len(costs) == 1)
    if affinity_key and decision.rule == "affinity":
        ties = [name for name, cost in costs.items() if cost == least]
        assert decision.replica == favourite(affinity_key, ties)


def brute_costs(replicas: list[Replica], prompt: list[int]) -> dict[str, float]:
    """Look at every replica and every block."""
    parts = {}
    for replica in replicas:
        hasher = PrefixHasher(KEY, replica.block_size)
        hashes, size = hasher.blocks(hasher.root(), prompt), replica.block_size
        longest = (len(prompt) - 1) // size * size
        has = min(count_matched(hashes, replica.resident) * size, longest)
        far = count_matched(hashes, {*replica.resident, *replica.pending}) * size
        is_shared = far > count_matched(hashes, replica.resident) * size
        parts[replica.replica] = (has, min(far, longest), is_shared)
    able = [r for r in replicas if r.credit_tokens + parts[r.replica][1] - parts[r.replica][0] > 0]
    computed = max(
        ((far, -has) for r in able for has, far, is_shared in [parts[r.replica]] if is_shared), default=(0, 0)
    )
    costs = {}
    for replica in able:
        has, far, is_shared = parts[replica.replica]
        owed = max(replica.owed_tokens - (far - has), 0)
        wasted = 0 if is_shared else max(computed[0] - max(-computed[1], has), 0)
        weight = DECODE_TOKENS * replica.num_running + DISPLACED_TOKENS * int(8 * replica.cache_use)
        costs[replica.replica] = owed + len(prompt) - far + wasted + weight
    return costs


class Member(Replica):
    """What a roster knows of it is in `slot`."""

    slot: int | None = None


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(-1, 2), st.booleans()), max_size=40))
def test_a_roster_is_right_whoever_comes_goes_and_changes(steps: list[tuple[int, int, int, bool]]) -> None:
    roster, members = Roster(), [Member(str(i), capabilities=frozenset("ab"[: i % 3])) for i in range(5)]
    for number, owed, credit, is_open in steps:
        member = members[number]
        if member.slot is None:
            member.slot = roster.join(member)
            roster.index.store(member.slot, [bytes([number]) * 16])
        elif credit < 0:
            roster.leave(member.slot)
            member.slot = None
        else:
            member.owed_tokens, member.credit_tokens, member.is_open = owed, credit, is_open
            roster.changed(member.slot)
        roster.check_integrity()
        present = [member for member in members if member.slot is not None]
        able = [member for member in present if member.is_open and member.credit_tokens > 0]
        loads = [load for load, slots in roster.by_load(-1, 40) for _ in slots_of(slots)]
        assert loads == sorted(load_of(member) for member in able)
        assert roster.credit_tokens == sum(member.credit_tokens for member in able)
        for needed in (frozenset(), frozenset("a"), frozenset("ab")):
            names = {roster[slot].replica for slot in slots_of(roster.able_to(needed))}
            assert names == {m.replica for m in present if m.is_open and needed <= m.capabilities}
        for key in ("u", "v"):
            if present:
                slots = sum(1 << member.slot for member in present if member.slot is not None)
                preferred = roster[roster.circle.favourite(key, slots)].replica
                assert preferred == favourite(key, (member.replica for member in present))
