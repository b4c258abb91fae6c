"""Where a request goes: the replica with the least cost in tokens. Pure: no clock, no asyncio, no gRPC.

    cost = prefill that the replica owes others + what of this prompt is not cached there + its decode load
           + what it would have to forget + what it has computed lately beyond its part

A block that was sent to a replica with an earlier prompt and is not computed yet counts as cached there: the engine
shares it while it computes it. What is owed of it is owed to this request as well and not to others; and to compute it
on another replica at the same time costs double, as half of that is wasted. So a burst with one new prefix stays
together until the rest of what is owed there is twice the prefix.

Replicas without credit are not asked, unless all that they lack it for is such a shared prefix. Ties go to the affinity
key's favourite, or to chance: a fixed tie-break would send everything to one replica. The decision is a value with all
its terms, so that it can be logged and replayed.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

from router.affinity import favourite
from router.roster import Roster
from router.types import Candidate, Decision, Request
from workers.prefix import PrefixHasher

MAX_CANDIDATES: Final = 4
"""Of a decision, the cheapest first: what a span and a Terminal may carry."""


class PromptHashes:
    """The block hashes of one request's prompt, and of the received tokens of an only choice, made when somebody asks
    for them; replicas may differ in block size."""

    __slots__ = ("_half", "_hashes", "_key", "_known", "_request")

    def __init__(self, key: bytes, request: Request) -> None:
        self._key = key
        self._request = request
        received = request.received
        self._known: Sequence[int] = [*request.prompt, *received[0]] if len(received) == 1 else request.prompt
        self._hashes: dict[int, list[bytes]] = {}
        self._half: tuple[int, bytes | None] = (0, None)
        """A block size and what `half` says of it: the queue asks again and again."""

    def of(self, block_size: int) -> list[bytes]:
        """Return the hashes of all full blocks."""
        hashes = self._hashes.get(block_size)
        if hashes is None:
            hasher = _hasher(self._key, block_size)
            root = _root(hasher, self._request.salt, self._request.adapter)
            hashes = self._hashes[block_size] = hasher.blocks(root, self._known)
        return hashes

    def half(self, block_size: int) -> bytes | None:
        """Return the hash of the block with which the first half of all full blocks ends; None if there is none."""
        if self._half[0] != block_size:
            blocks = self.of(block_size)
            self._half = (block_size, blocks[(len(blocks) - 1) // 2] if blocks else None)
        return self._half[1]


# Made once, since they are half the work of hashing a short prompt.
_hasher = lru_cache(16)(PrefixHasher)
_root = lru_cache(1_024)(PrefixHasher.root)


class Placement(Protocol):
    """A way to choose. `LeastCost` is ours; benchmarks bring others to measure it by."""

    def place(self, request: Request, hashes: PromptHashes, roster: Roster, *, attempt: int = 1) -> Decision | None:
        """Return where `request` goes, or None when no replica has credit for it."""


class _Group(NamedTuple):
    """Replicas with the same part of a prompt: their cost differs by their load only."""

    slots: int
    matched_tokens: int
    uncached_tokens: float
    """The rest of it, by what that costs."""
    surplus_tokens: int = 0
    """What of the matched ones does not count, as these replicas have computed more than their part lately."""


_Level = tuple[float, int, int, float, int]
"""Replicas of one group, or one that computes a part of the prompt, with the same cost: that cost, their slots, and
matched, uncached and surplus tokens as in `_Group`. A plain one, as a decision makes a dozen of them."""


class LeastCost:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def place(self, request: Request, hashes: PromptHashes, roster: Roster, *, attempt: int = 1) -> Decision | None:
        allowed = roster.able_to(request.needed_capabilities)
        sharing, groups = _offers(request, hashes, roster, allowed)
        levels = _levels(sharing, groups, roster)
        if not levels:
            return None
        least, ties = levels[0][0], 0
        for cost, slots, *_ in levels:
            if cost != least:
                break
            ties |= slots
        is_tie = ties & (ties - 1) != 0
        if is_tie and request.affinity_key:
            slot = roster.circle.favourite(request.affinity_key, ties)
        else:
            slot = _draw(self._rng, ties) if is_tie else ties.bit_length() - 1
        candidates = _listed(slot, levels, dict(sharing), roster)
        return Decision(
            replica=candidates[0].replica,
            rule=_rule(candidates, is_affine=is_tie and bool(request.affinity_key)),
            matched_tokens=candidates[0].matched_tokens,
            candidates=tuple(candidates),
            attempt=attempt,
        )


def replay(decision: Decision, affinity_key: str) -> tuple[str, str]:
    """Return the replica and the rule that follow from the terms of a decision's candidates.

    Where several cost the same and there is no key chance has chosen, and the candidate that it chose comes first."""
    candidates = sorted(decision.candidates, key=lambda candidate: candidate.cost)
    ties = [candidate for candidate in candidates if candidate.cost == candidates[0].cost]
    is_affine = len(ties) > 1 and bool(affinity_key)
    if is_affine:
        name = favourite(affinity_key, (candidate.replica for candidate in ties))
        candidates.sort(key=lambda candidate: candidate.replica != name)
    return candidates[0].replica, _rule(candidates, is_affine=is_affine)


def _offers(
    request: Request, hashes: PromptHashes, roster: Roster, allowed: int
) -> tuple[list[tuple[int, Candidate]], list[_Group]]:
    """Return the replicas that compute a part of the prompt that they have not, by slot; and all others in groups.

    The last token of a prompt is always computed: its logits choose the first token of the answer.
    """
    num_tokens = request.num_known_tokens
    sharing: list[tuple[int, Candidate]] = []
    matches: list[tuple[int, int]] = []
    rest = allowed
    computed = [0, 0]
    """From where to where the prompt is being computed somewhere: of several such parts the one that ends last."""
    for size in roster.block_sizes:
        longest = (num_tokens - 1) // size * size
        runs, shared = roster.index.match(hashes.of(size))
        for num_blocks, slots in runs:
            matches.append((slots & allowed, min(num_blocks * size, longest)))
            rest &= ~slots
        for slot, (num_blocks, num_resident) in shared.items():
            if not allowed >> slot & 1:
                continue
            rest &= ~(1 << slot)
            matched, resident = min(num_blocks * size, longest), min(num_resident * size, longest)
            replica = roster[slot]
            if replica.credit_sequences > 0 and replica.credit_tokens + matched - resident > 0:
                sharing.append(
                    (slot, _candidate(roster, slot, matched, num_tokens - matched, shared_tokens=matched - resident))
                )
                computed = max(computed, [resident, matched], key=lambda part: (part[1], -part[0]))
    groups, recent = [], roster.recent
    for slots, matched in (*matches, (rest, 0)):
        wasted = max(computed[1] - max(computed[0], matched), 0)
        uncached, overworked = num_tokens - matched + wasted, slots & recent.overworked if matched else 0
        groups.append(_Group(slots & ~overworked, matched, uncached))
        if overworked:
            for surplus, equals in recent.by_surplus.items():
                groups.append(_Group(slots & equals, matched, uncached, min(surplus, matched)))
    return sharing, groups


def _candidate(
    roster: Roster,
    slot: int,
    matched_tokens: int,
    uncached_tokens: float,
    *,
    shared_tokens: int = 0,
    surplus_tokens: int = 0,
) -> Candidate:
    """`shared_tokens` is what it owes of this very prompt."""
    name, owed, decode, displaced, recent = roster.terms(slot)
    if shared_tokens:
        owed = max(owed - shared_tokens, 0.0)
    return Candidate(name, matched_tokens, owed, float(uncached_tokens), decode, displaced, recent + surplus_tokens)


def _levels(sharing: Sequence[tuple[int, Candidate]], groups: Sequence[_Group], roster: Roster) -> list[_Level]:
    """Return who can take the request, the cheapest first, as far as that may be listed."""
    levels: list[_Level] = [(candidate.cost, 1 << slot, 0, 0.0, 0) for slot, candidate in sharing]
    for slots, matched, uncached, surplus in groups:
        levels += [
            (load + uncached + surplus, equals, matched, uncached, surplus)
            for load, equals in roster.by_load(slots, MAX_CANDIDATES)
        ]
    levels.sort()
    return levels


def _listed(chosen: int, levels: Sequence[_Level], shared: Mapping[int, Candidate], roster: Roster) -> list[Candidate]:
    """Return the chosen candidate and the cheapest of the others, in the order of their cost."""
    first: list[Candidate] = []
    others: list[Candidate] = []
    for _, slots, matched, uncached, surplus in levels:
        left = slots
        if not first and left >> chosen & 1:
            first.append(shared.get(chosen) or _candidate(roster, chosen, matched, uncached, surplus_tokens=surplus))
            left ^= 1 << chosen
        while left and len(others) < MAX_CANDIDATES - 1:
            lowest = left & -left
            left ^= lowest
            slot = lowest.bit_length() - 1
            others.append(shared.get(slot) or _candidate(roster, slot, matched, uncached, surplus_tokens=surplus))
        if first and len(others) == MAX_CANDIDATES - 1:
            break
    return first + others


def _rule(candidates: Sequence[Candidate], *, is_affine: bool) -> str:
    """Say why the first of `candidates` was chosen: for what it has cached or computes anyway, if it might have lost to
    one with less of the prompt, had nobody any of it."""
    chosen = candidates[0]
    if len(candidates) == 1:
        return "only"
    if is_affine:
        return "affinity"
    matched = chosen.matched_tokens
    if not matched:
        return "least_loaded"
    load = chosen.cost - chosen.uncached_tokens
    num_tokens = matched + chosen.uncached_tokens
    for other in candidates:
        if other.matched_tokens < matched:
            would_waste = other.matched_tokens + other.uncached_tokens > num_tokens
            if would_waste or other.cost - other.uncached_tokens <= load:
                return "prefix"
    return "least_loaded"


def _draw(rng: random.Random, slots: int) -> int:
    """Return one of `slots`, each as likely as any other: the half of them in which it is, again and again."""
    number, low, high = rng.randrange(slots.bit_count()), 0, slots.bit_length()
    while high - low > 1:
        middle = (low + high) // 2
        below = (slots >> low & (1 << (middle - low)) - 1).bit_count()
        if number < below:
            high = middle
        else:
            low, number = middle, number - below
    return low
