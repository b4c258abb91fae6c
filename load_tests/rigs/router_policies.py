"""Other ways to place requests, to measure ours by: what most routers do. Each implements `router.placement.Placement`.

random          any replica that can take it
round_robin     one after the other
least_loaded    the one that owes least, in tokens, whatever it has cached
power_of_two    of two random ones the one that owes less
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

from router.placement import LeastCost, Placement, PromptHashes
from router.prefix_index import slots_of
from router.roster import Roster, load_of
from router.types import Candidate, Decision, Request

Choose = Callable[[Roster, Sequence[int]], int]
"""Returns one of the slots."""


class Policy:
    def __init__(self, name: str, choose: Choose) -> None:
        self._name = name
        self._choose = choose

    def place(self, request: Request, hashes: PromptHashes, roster: Roster, *, attempt: int = 1) -> Decision | None:
        slots = list(slots_of(roster.able_to(request.needed_capabilities) & roster.able))
        if not slots:
            return None
        replica = roster[self._choose(roster, slots)].replica
        return Decision(replica=replica, rule=self._name, candidates=(Candidate(replica=replica),), attempt=attempt)


def _round_robin() -> Choose:
    last = -1

    def choose(_: Roster, slots: Sequence[int]) -> int:
        nonlocal last
        last = next((slot for slot in slots if slot > last), slots[0])
        return last

    return choose


def _least(rng: random.Random, roster: Roster, slots: Sequence[int]) -> int:
    """Return one with the least load; of several, any: a fixed one would get all of a burst."""
    loads = {slot: load_of(roster[slot]) for slot in slots}
    least = min(loads.values())
    return rng.choice([slot for slot, load in loads.items() if load == least])


POLICIES: Final = ("random", "round_robin", "least_loaded", "power_of_two")


def make_placement(name: str, rng: random.Random) -> Placement:
    """Return the policy `name`, or ours for the empty one."""
    if not name:
        return LeastCost(rng)
    choices: dict[str, Choose] = {
        "random": lambda _, slots: rng.choice(slots),
        "round_robin": _round_robin(),
        "least_loaded": lambda roster, slots: _least(rng, roster, slots),
        "power_of_two": lambda roster, slots: _least(rng, roster, rng.sample(slots, min(2, len(slots)))),
    }
    return Policy(name, choices[name])
