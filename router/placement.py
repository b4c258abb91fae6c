"""Where a group of requests goes: the replica with the least cost in tokens. Pure: no clock, no asyncio, no gRPC.

    cost = prefill that the replica owes others + what of this prompt is not cached there + its decode load

Replicas without credit are not asked. Ties go to the affinity key's favourite, or to chance: a fixed tie-break would
send everything to one replica. The decision is a value with all its terms, so that it can be logged and replayed.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from router.types import Candidate, Decision, Request
from workers.prefix import PrefixHasher

DECODE_TOKENS = 32.0
"""What a running sequence weighs: it takes a token of each of its replica's next steps. On the CPU a row of a decode
step costs as much as 1 to 2 tokens of prefill, and an answer has some dozens of steps to go."""
MAX_CANDIDATES = 16
"""Of a decision, the cheapest first: what a span may carry."""


class Placeable(Protocol):
    """A replica as placement sees it; counts what the router has sent and the replica has not yet reported."""

    @property
    def replica(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def resident(self) -> AbstractSet[bytes]:
        """Hashes of the blocks that are in its cache."""

    @property
    def owed_tokens(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def credit_tokens(self) -> int: ...


class PromptHashes:
    """The block hashes of one request's prompt, and of the received tokens of an only choice, made when first asked
    for; replicas may differ in block size."""

    __slots__ = ("_hashes", "_key", "_request")

    def __init__(self, key: bytes, request: Request) -> None:
        self._key = key
        self._request = request
        self._hashes: dict[int, list[bytes]] = {}

    def of(self, block_size: int) -> list[bytes]:
        hashes = self._hashes.get(block_size)
        if hashes is None:
            hasher = PrefixHasher(self._key, block_size)
            root = hasher.root(self._request.salt, self._request.adapter)
            received = self._request.received
            known = [*self._request.prompt, *received[0]] if len(received) == 1 else self._request.prompt
            hashes = self._hashes[block_size] = hasher.blocks(root, known)
        return hashes


class Placement:
    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def place(
        self, request: Request, hashes: PromptHashes, replicas: Sequence[Placeable], *, attempt: int = 1
    ) -> Decision | None:
        """Return where `request` goes, or None when no replica has credit."""
        candidates = [_candidate(request, hashes, replica) for replica in replicas if replica.credit_tokens > 0]
        if not candidates:
            return None
        least = min(candidate.cost for candidate in candidates)
        ties = [candidate for candidate in candidates if candidate.cost == least]
        if len(candidates) == 1:
            chosen, rule = candidates[0], "only"
        elif len(ties) > 1 and request.affinity_key:
            chosen, rule = max(ties, key=lambda c: _favour(request.affinity_key, c.replica)), "affinity"
        else:
            chosen = self._rng.choice(ties)
            rule = "prefix" if _owes_to_cache(chosen, candidates) else "least_loaded"
        return Decision(
            replica=chosen.replica,
            rule=rule,
            matched_tokens=chosen.matched_tokens,
            candidates=tuple(heapq.nsmallest(MAX_CANDIDATES, candidates, key=lambda c: c.cost)),
            attempt=attempt,
        )


def count_matched(hashes: Sequence[bytes], resident: AbstractSet[bytes]) -> int:
    """Return how many leading `hashes` are resident."""
    for count, block_hash in enumerate(hashes):
        if block_hash not in resident:
            return count
    return len(hashes)


def _candidate(request: Request, hashes: PromptHashes, replica: Placeable) -> Candidate:
    size = replica.block_size
    num_tokens = request.num_known_tokens
    matched = count_matched(hashes.of(size), replica.resident) * size if replica.resident else 0
    # The last token of a prompt is always computed: its logits choose the first token of the answer.
    matched = min(matched, (num_tokens - 1) // size * size)
    return Candidate(
        replica=replica.replica,
        matched_tokens=matched,
        owed_tokens=float(replica.owed_tokens),
        uncached_tokens=float(num_tokens - matched),
        decode_tokens=DECODE_TOKENS * replica.num_running,
    )


def _owes_to_cache(chosen: Candidate, candidates: Sequence[Candidate]) -> bool:
    """Say whether `chosen` might have lost to one with less of the prompt cached, had nobody cached any of it."""
    bare = chosen.cost + chosen.matched_tokens
    return any(c.matched_tokens < chosen.matched_tokens and c.cost + c.matched_tokens <= bare for c in candidates)


def _favour(affinity_key: str, replica: str) -> bytes:
    """Rank replicas for a key (rendezvous hashing): few keys move when a replica comes or goes."""
    return hashlib.blake2b(f"{len(affinity_key)}:{affinity_key}{replica}".encode(), digest_size=8).digest()
