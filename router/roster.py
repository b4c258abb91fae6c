"""All replicas that may be sent work, as placement sees them: who can take something, in the order of their load.

Owns the slots by which replicas are named in sets (an int with a bit for each), the order by load, the sum of credits,
the prefix index and what replicas have computed lately. Whoever mirrors a replica lets it `join`, says when something
about it has changed, and lets it `leave`. Pure; a change costs a search in a sorted list, a question no more than the
loads it has to look at.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Final, NamedTuple, Protocol, TypeVar

from router.affinity import Circle
from router.prefix_index import MAX_ENTRIES, PrefixIndex, slots_of
from router.recent_work import RecentWork

DECODE_TOKENS: Final = 8.0
"""What a running sequence weighs: it takes a token of each of its replica's next steps, those among them in which a new
prompt is computed, and makes the steps of the others longer. That is some rows for a prompt of average length; what it
has still to generate costs the same on any replica. With 32 a burst of 32 questions about one new document was spread
over three replicas, each of which computed it; the balance over minutes is the same with 8 and with 32."""
DISPLACED_TOKENS: Final = 16.0
_EIGHTHS: Final = 8
"""A cache weighs `DISPLACED_TOKENS` for each eighth that is in use: whoever stores a prompt in a full one forgets
another. So prefixes spread over caches that have room, also while nothing queues that could spread them. In steps, so
that replicas of about the same fill are equal."""
Key = TypeVar("Key")
_FEW: Final = 32
"""So few replicas are looked at one by one; of more, the loads in their order."""


class Placeable(Protocol):
    """A replica as placement sees it; counts what the router has sent and the replica has not yet reported."""

    @property
    def replica(self) -> str: ...
    @property
    def block_size(self) -> int: ...
    @property
    def capabilities(self) -> frozenset[str]: ...
    @property
    def owed_tokens(self) -> int:
        """Prompt tokens that it is to compute."""

    @property
    def num_running(self) -> int: ...
    @property
    def cache_use(self) -> float:
        """Which part of its blocks can be found under a hash, 0 to 1."""

    @property
    def credit_tokens(self) -> int:
        """Prompt tokens that it can still take; not above zero: none."""

    @property
    def credit_sequences(self) -> int:
        """Choices that it can still take on; not above zero: none, and `credit_tokens` is 0."""

    @property
    def is_open(self) -> bool:
        """Whether it may be sent work at all."""


class Terms(NamedTuple):
    """What a replica has on its hands, in tokens."""

    replica: str
    owed_tokens: float
    decode_tokens: float
    displaced_tokens: float
    """What it would have to forget for a new prompt."""
    recent_tokens: float
    """What it has computed lately beyond the mean, weighed."""


class _Place:
    """A replica as it was when it was last looked at."""

    __slots__ = ("credit_sequences", "credit_tokens", "load", "replica", "terms")

    def __init__(self, replica: Placeable) -> None:
        self.replica = replica
        self.terms = terms_of(replica, 0.0)
        self.load: float | None = None
        """None: it is not in the order, as it has no credit or takes no work."""
        self.credit_tokens = 0
        self.credit_sequences = 0


class Roster:
    def __init__(self, *, max_index_entries: int = MAX_ENTRIES) -> None:
        self.index = PrefixIndex(max_index_entries)
        self.circle = Circle()
        self.recent = RecentWork()
        self.credit_tokens = 0
        """What all replicas together can still take."""
        self.credit_sequences = 0
        """The same in sequences, of those that can still take tokens."""
        self.open = 0
        """Slots of replicas that may be sent work."""
        self.able = 0
        """Those of them that have credit."""
        self._places: dict[int, _Place] = {}
        self._free: list[int] = []
        """Slots that were given back, all below the number of slots ever given."""
        self._loads: list[float] = []
        """The different loads of those that are able, in order."""
        self._by_load: dict[float, int] = {}
        self._by_size: dict[int, int] = {}
        """Slots by block size."""
        self._by_capabilities: dict[frozenset[str], int] = {}

    def __getitem__(self, slot: int) -> Placeable:
        return self._places[slot].replica

    def terms(self, slot: int) -> Terms:
        return self._places[slot].terms

    @property
    def block_sizes(self) -> list[int]:
        return list(self._by_size)

    def join(self, replica: Placeable) -> int:
        """Return the slot by which `replica` is known until it leaves. Its block size and capabilities stay."""
        slot = self._free.pop() if self._free else len(self._places)
        self._places[slot] = _Place(replica)
        bit = 1 << slot
        self._by_size[replica.block_size] = self._by_size.get(replica.block_size, 0) | bit
        self._by_capabilities[replica.capabilities] = self._by_capabilities.get(replica.capabilities, 0) | bit
        self.circle.join(slot, replica.replica)
        self.recent.join(slot)
        self.changed(slot)
        return slot

    def leave(self, slot: int) -> None:
        """Forget a replica and all its blocks. Nothing is expected of it any more."""
        place = self._places[slot]
        self._count_sequences(place, 0)
        self._move(slot, place, None, 0)
        self.open &= ~(1 << slot)
        self.index.clear(slot)
        self.circle.leave(slot, place.replica.replica)
        self.recent.leave(slot)
        _drop(self._by_size, place.replica.block_size, slot)
        _drop(self._by_capabilities, place.replica.capabilities, slot)
        del self._places[slot]
        self._free.append(slot)

    def changed(self, slot: int) -> None:
        """Look at a replica again: its load, its credit, or whether it is open may be another."""
        place = self._places[slot]
        replica, bit = place.replica, 1 << slot
        if not replica.is_open:
            self.open &= ~bit
            self._count_sequences(place, 0)
            self._move(slot, place, None, 0)
            return
        self.open |= bit
        recent = self.recent.look(slot, is_busy=replica.num_running > 0)
        place.terms = terms = terms_of(replica, recent)
        credit = max(replica.credit_tokens, 0)
        load = _sum(terms) if credit else None
        self._count_sequences(place, max(replica.credit_sequences, 0) if credit else 0)
        if load != place.load or credit != place.credit_tokens:
            self._move(slot, place, load, credit)

    def able_to(self, needed: frozenset[str]) -> int:
        """Return the slots of the replicas that may be sent work and have all `needed` capabilities."""
        if not needed:
            return self.open
        mask = 0
        for capabilities, slots in self._by_capabilities.items():
            if needed <= capabilities:
                mask |= slots
        return mask & self.open

    def by_load(self, slots: int, number: int) -> list[tuple[float, int]]:
        """Return those of `slots` that have credit, as (load, slots that have it), the least load first: of `number`
        replicas, if there are so many, and of all that have the same load as the last one."""
        slots &= self.able
        if not slots & slots - 1:
            return [(self._load(slots.bit_length() - 1), slots)] if slots else []
        found: list[tuple[float, int]] = []
        if slots.bit_count() > _FEW:
            by_load = self._by_load
            for load in self._loads:
                if equals := by_load[load] & slots:
                    found.append((load, equals))
                    number -= equals.bit_count()
                    if number <= 0:
                        break
            return found
        few: dict[float, int] = {}
        for slot in slots_of(slots):
            load = self._load(slot)
            few[load] = few.get(load, 0) | 1 << slot
        for load in sorted(few):
            found.append((load, few[load]))
            number -= few[load].bit_count()
            if number <= 0:
                break
        return found

    def _load(self, slot: int) -> float:
        """Of one that is able."""
        load = self._places[slot].load
        assert load is not None
        return load

    def has_at_hand(self, block_hash: bytes) -> bool:
        """Say whether a replica with credit has this block, or computes it."""
        return self.index.holders(block_hash) & self.able != 0

    def _count_sequences(self, place: _Place, credit_sequences: int) -> None:
        self.credit_sequences += credit_sequences - place.credit_sequences
        place.credit_sequences = credit_sequences

    def _move(self, slot: int, place: _Place, load: float | None, credit_tokens: int) -> None:
        self.credit_tokens += credit_tokens - place.credit_tokens
        place.credit_tokens = credit_tokens
        old = place.load
        if load == old:
            return
        place.load = load
        bit = 1 << slot
        if old is not None:
            if left := self._by_load[old] & ~bit:
                self._by_load[old] = left
            else:
                del self._by_load[old]
                del self._loads[bisect_left(self._loads, old)]
        if load is None:
            self.able &= ~bit
            return
        self.able |= bit
        if load in self._by_load:
            self._by_load[load] |= bit
        else:
            self._by_load[load] = bit
            insort(self._loads, load)

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        self.index.check_integrity()
        self.recent.check_integrity()
        assert self._loads == sorted(self._by_load)
        for slot, place in self._places.items():
            replica, bit = place.replica, 1 << slot
            is_able = replica.is_open and replica.credit_tokens > 0
            assert bool(self.open & bit) == replica.is_open
            assert bool(self.able & bit) == is_able
            assert not is_able or place.terms == terms_of(replica, place.terms.recent_tokens)
            assert place.load == (_sum(place.terms) if is_able else None)
            assert place.load is None or self._by_load[place.load] & bit
            assert self._by_size[replica.block_size] & bit
            assert self._by_capabilities[replica.capabilities] & bit
        assert sum(mask.bit_count() for mask in self._by_load.values()) == self.able.bit_count()
        assert sum(mask.bit_count() for mask in self._by_size.values()) == len(self._places)
        assert self.credit_tokens == sum(place.credit_tokens for place in self._places.values())
        assert self.credit_sequences == sum(place.credit_sequences for place in self._places.values())


def load_of(replica: Placeable) -> float:
    """Return what a replica has on its hands, in tokens."""
    return _sum(terms_of(replica, 0.0))


def terms_of(replica: Placeable, recent_tokens: float) -> Terms:
    return Terms(
        replica.replica,
        float(replica.owed_tokens),
        DECODE_TOKENS * replica.num_running,
        DISPLACED_TOKENS * int(_EIGHTHS * replica.cache_use),
        recent_tokens,
    )


def _sum(terms: Terms) -> float:
    _, owed, decode, displaced, recent = terms
    return owed + decode + displaced + recent


def _drop(slots: dict[Key, int], key: Key, slot: int) -> None:
    if left := slots[key] & ~(1 << slot):
        slots[key] = left
    else:
        del slots[key]
