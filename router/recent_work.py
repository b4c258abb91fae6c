"""What each replica has computed lately, beside the mean of all: so that work which never queues is shared out as well.

A prefix stays where it is cached, and a load that no queue shows would stay there with it: two prefixes that began on
one replica, while another has none, make the one compute twice the mean for good. By what they have computed, that is

    up to MAX_STEPS      more than the mean, by steps: a small cost, which decides between replicas that have the same
    beyond them          surplus: so much of what is cached there counts as not cached, while others run there, too

As much as a replica has computed beyond its part, it may cost to compute a prefix once more elsewhere: it is then on
two replicas, and requests go to either. So a prefix is copied once for an imbalance, and a large one for a large one.
What is not cached costs no more on a replica with a surplus, and load counts as ever, so nobody is flooded instead.

All routers hear the same counters from the replicas, so they agree. "Lately" is counted in work, not in time: what was
computed weighs half when all have computed HALF_LIFE tokens each since. Who is new counts as the mean. Pure.
"""

from __future__ import annotations

from typing import Final

HALF_LIFE: Final = 32_768
"""Tokens that each replica computes, on average, until what it had computed before weighs half. Less, and chance makes
imbalances of a few large prompts; more, and one that begins after long balance is seen late."""
FLOOR: Final = 2_048
"""Who has computed no more is never found to have done too much: so little is one burst with a new prefix."""
STEPS: Final = 16
"""Make the mean."""
MAX_STEPS: Final = 2
"""With eight a third more than the mean stayed: four prefixes on three of eight replicas, one on two others."""
STEP_TOKENS: Final = 16.0
"""A step weighs as much as an eighth of a full cache, or two running sequences. In steps, so that replicas that have
computed about the same are equal."""
MIN_SURPLUS: Final = 256
_MAX_UNIT: Final = 2.0**64
_MAX_AT_ONCE: Final = 16


class RecentWork:
    """Replicas are the slots of a `Roster`."""

    def __init__(self) -> None:
        self.overworked = 0
        """Slots of replicas with a surplus."""
        self.by_surplus: dict[int, int] = {}
        """The same by their surplus, in tokens, rounded down to a power of two."""
        self._surplus: dict[int, int] = {}
        self._computed: dict[int, float] = {}
        """In units that grow, instead of all that was computed before becoming less."""
        self._total = 0.0
        self._unit = 1.0

    def join(self, slot: int) -> None:
        self._computed[slot] = mean = self._total / len(self._computed) if self._computed else 0.0
        self._total += mean

    def leave(self, slot: int) -> None:
        self._set_surplus(slot, 0)
        del self._computed[slot]
        self._total = sum(self._computed.values())  # a difference of what may be of other orders would be noise

    def add(self, slot: int, num_tokens: int) -> None:
        """The replica has computed so many more; what is beyond `_MAX_AT_ONCE` half-lives of all is beyond belief."""
        share = HALF_LIFE * len(self._computed)
        num_tokens = min(max(num_tokens, 0), _MAX_AT_ONCE * share)
        self._unit *= 2.0 ** (num_tokens / share)
        computed = num_tokens * self._unit
        self._computed[slot] += computed
        self._total += computed
        if self._unit > _MAX_UNIT:
            self._computed = {slot: computed / self._unit for slot, computed in self._computed.items()}
            self._total = sum(self._computed.values())
            self._unit = 1.0

    def look(self, slot: int, *, is_busy: bool) -> float:
        """Return what it costs, in tokens, that the replica has computed more than others, and see whether it has a
        surplus. Without others' requests there it has none: nobody is in anybody's way."""
        computed, mean = self._computed[slot], self._total / len(self._computed)
        floor = FLOOR * self._unit
        if computed <= floor or computed <= mean:
            if self.overworked:
                self._set_surplus(slot, 0)
            return 0.0
        steps = int(STEPS * (computed / mean - 1.0))
        if steps < MAX_STEPS:
            self._set_surplus(slot, 0)
            return STEP_TOKENS * steps
        part = max(mean * (1 + MAX_STEPS / STEPS), floor)
        surplus = int((computed - part) / self._unit) if is_busy else 0
        self._set_surplus(slot, 1 << surplus.bit_length() - 1 if surplus >= MIN_SURPLUS else 0)
        return STEP_TOKENS * MAX_STEPS

    def _set_surplus(self, slot: int, surplus: int) -> None:
        before, bit = self._surplus.get(slot, 0), 1 << slot
        if surplus == before:
            return
        if before:
            if left := self.by_surplus[before] & ~bit:
                self.by_surplus[before] = left
            else:
                del self.by_surplus[before]
        if surplus:
            self._surplus[slot] = surplus
            self.by_surplus[surplus] = self.by_surplus.get(surplus, 0) | bit
            self.overworked |= bit
        else:
            del self._surplus[slot]
            self.overworked &= ~bit

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        assert abs(self._total - sum(self._computed.values())) <= 1e-6 * max(self._total, 1.0)
        assert self._surplus.keys() <= self._computed.keys()
        assert self.overworked == sum(1 << slot for slot in self._surplus) == sum(self.by_surplus.values())
        for slot, surplus in self._surplus.items():
            assert self.by_surplus[surplus] >> slot & 1
