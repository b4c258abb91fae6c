"""What replicas have computed lately: whose cached prefixes count less for it, and that balance heals so."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from octavo.internal.v1 import data_plane_pb2 as pb

from router.placement import LeastCost, PromptHashes, replay
from router.recent_work import FLOOR, HALF_LIFE, MAX_STEPS, STEP_TOKENS, STEPS, RecentWork
from router.replica_state import ReplicaState
from router.roster import Roster
from router.types import Decision, Request
from tests.router_back.made_requests import make_request
from tests.router_back.routers_simulation import BLOCK, KEY, simulate

PART = 1 + MAX_STEPS / STEPS
"""Of the mean: beyond it there is a surplus."""


def computed(*tokens: int) -> RecentWork:
    recent = RecentWork()
    for slot in range(len(tokens)):
        recent.join(slot)
    for _ in range(10):
        for slot, number in enumerate(tokens):
            recent.add(slot, number // 10)
    return recent


def surplus(recent: RecentWork, slot: int) -> int:
    return next((surplus for surplus, slots in recent.by_surplus.items() if slots >> slot & 1), 0)


def test_little_work_is_never_too_much() -> None:
    recent = computed(FLOOR - 30, 0, 0, 0)
    assert recent.look(0, is_busy=True) == 0.0
    assert recent.overworked == 0


def test_more_than_the_mean_costs_steps() -> None:
    for share, steps in ((0.9, 0), (1.05, 0), (1.07, 1), (1.12, 1), (1.2, MAX_STEPS), (3.0, MAX_STEPS)):
        others = round(2_000 * (4 - share) / 3)
        recent = computed(round(2_000 * share), others, others, others)
        assert recent.look(0, is_busy=True) == steps * STEP_TOKENS, share


def test_a_surplus_is_what_is_beyond_the_part_in_powers_of_two() -> None:
    recent = computed(4_000, 1_000, 1_000, 1_000)
    assert recent.look(0, is_busy=True) == MAX_STEPS * STEP_TOKENS
    assert 1_024 == surplus(recent, 0) <= 4_000 - PART * 1_750 < 2_048 * 1.1
    assert recent.overworked == 0b0001
    recent.check_integrity()


def test_who_is_idle_has_no_surplus() -> None:
    """The prefix of a single user, whose turns come one after the other, stays where it is."""
    recent = computed(4_000, 0, 0, 0)
    recent.look(0, is_busy=True)
    assert recent.overworked == 0b0001
    recent.look(0, is_busy=False)
    assert recent.overworked == 0


def test_who_is_new_counts_as_the_mean() -> None:
    recent = computed(4_000, 4_000)
    recent.join(2)
    for slot in range(3):
        assert recent.look(slot, is_busy=True) == 0.0
    recent.add(2, 2_000)
    assert recent.look(2, is_busy=True) > 0.0
    recent.leave(2)
    assert recent.look(0, is_busy=True) == 0.0
    recent.check_integrity()


def test_what_was_computed_long_ago_weighs_less() -> None:
    recent = computed(8_000, 0)
    recent.look(0, is_busy=True)
    before = surplus(recent, 0)
    for _ in range(100):
        recent.add(0, HALF_LIFE // 25)
        recent.add(1, HALF_LIFE // 25)
    recent.look(0, is_busy=True)
    assert before == 2_048
    assert surplus(recent, 0) == 0, "after four half-lives"


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from(["join", "leave", "add", "busy", "idle"]), st.integers(0, 10**7))
    )
)
def test_books_agree(acts: list[tuple[int, str, int]]) -> None:
    recent, there = RecentWork(), set[int]()
    for slot, act, number in acts:
        if act == "join" and slot not in there:
            recent.join(slot)
            there.add(slot)
        elif slot in there:
            if act == "leave":
                recent.leave(slot)
                there.discard(slot)
            elif act == "add":
                recent.add(slot, number)
            elif act != "join":
                assert 0.0 <= recent.look(slot, is_busy=act == "busy") <= MAX_STEPS * STEP_TOKENS
        recent.check_integrity()


def test_a_count_beyond_belief_neither_raises_nor_lasts() -> None:
    recent = RecentWork()
    for slot in range(3):
        recent.join(slot)
    recent.add(0, 2**63)
    recent.add(1, -5)
    assert recent.look(0, is_busy=True) == MAX_STEPS * STEP_TOKENS
    for _ in range(40):
        for slot in (1, 2):
            recent.add(slot, 2 * HALF_LIFE)
    assert recent.look(0, is_busy=True) == 0.0
    recent.check_integrity()


# Where requests go.


def attached(roster: Roster, name: str) -> ReplicaState:
    state = ReplicaState(name, roster)
    state.start(
        pb.HelloAck(block_size=BLOCK, num_blocks=128, load=pb.Load(credit_tokens=512, num_computed_tokens=9_000))
    )
    return state


def tell(state: ReplicaState, num_computed: int, *, num_running: int, stored: list[bytes] | None = None) -> None:
    load = pb.Load(credit_tokens=512, num_computed_tokens=9_000 + num_computed, num_running=num_running)
    state.update(pb.StepBatch(load=load, kv_events=pb.KvEvents(stored=b"".join(stored or []))))


def placed(num_computed: int, *, num_running: int, num_shared: int = 512) -> Decision:
    """Place a request of whose prompt the one replica has the first tokens, and has computed so many; the other
    none."""
    roster, request = Roster(), make_request(range(528))
    hashes = PromptHashes(KEY, request)
    one, other = attached(roster, "one"), attached(roster, "other")
    tell(one, num_computed, num_running=num_running, stored=hashes.of(BLOCK)[: num_shared // BLOCK])
    tell(other, 0, num_running=0)
    tell(one, num_computed, num_running=num_running)
    decision = LeastCost(random.Random(1)).place(request, hashes, roster)
    assert decision is not None
    assert replay(decision, "") == (decision.replica, decision.rule)
    roster.check_integrity()
    return decision


def test_a_prefix_is_computed_once_more_when_that_costs_no_more_than_the_surplus() -> None:
    """What a replica had computed before it was attached does not count."""
    assert (placed(2_000, num_running=2).replica, placed(2_300, num_running=2).replica) == ("one", "one")
    decision = placed(2_700, num_running=2)
    assert (decision.replica, decision.rule, decision.matched_tokens) == ("other", "least_loaded", 0)
    (one,) = (candidate for candidate in decision.candidates if candidate.replica == "one")
    assert (one.matched_tokens, one.uncached_tokens) == (512, 16)
    assert one.recent_tokens == MAX_STEPS * STEP_TOKENS + 512
    assert placed(2_700, num_running=0).replica == "one"


def test_a_surplus_costs_no_more_than_what_is_cached() -> None:
    """Else a replica that had been hot would get nothing, while others drown."""
    (one,) = (candidate for candidate in placed(30_000, num_running=2).candidates if candidate.replica == "one")
    assert one.recent_tokens == MAX_STEPS * STEP_TOKENS + 512
    cold = placed(30_000, num_running=2, num_shared=0)
    assert {candidate.recent_tokens for candidate in cold.candidates} == {0.0, MAX_STEPS * STEP_TOKENS}


def eight_prefixes(seed: int) -> list[Request]:
    """Ten seconds of a hundred requests a second."""
    rng, at, plan = random.Random(seed), 0.0, list[Request]()
    prefixes = [rng.choices(range(300, 30_000), k=512) for _ in range(8)]
    while (at := at + rng.expovariate(100)) < 10:
        prompt = [*rng.choice(prefixes), *rng.choices(range(300, 30_000), k=16)]
        plan.append(make_request(prompt, request_id=str(len(plan)), max_tokens=rng.randint(8, 32), accepted_at=at))
    return plan


@pytest.mark.parametrize("seed", [5])
def test_four_routers_that_met_on_a_replica_part_again(seed: int) -> None:
    """Within what a message takes, two of them compute a prefix twice, or begin two on one replica; then others have to
    share what is left. A prefix stayed where it began, and the most loaded replica had 1.9 and 1.4 times the mean."""
    plan = eight_prefixes(seed)
    four = simulate(plan, routers=4, seed=seed)
    assert four.balance < 1.2
    assert four.num_cached > 0.99 * (len(plan) - 8) * 512
