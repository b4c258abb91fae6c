"""How fast a tenant that has more than its part of the replicas may take places that become free. Pure.

Answers that begin together end together: a tenant with a long queue that takes all free places at once has them all
again at the next moment they are free, and in between a newcomer finds none, whatever its turn. So, while several
tenants are served, one that has more than `MORE` times an equal part of the places, or took more of late, takes free
ones over `FILL_SHARE` of the time that an answer takes, not at once, and leaves `KEPT_SHARE` of all. That spreads its
answers over time and leaves a few places for newcomers, also in the first second in which somebody asks for too much;
simulated, it costs 4 to 7 % of all that replicas can do. All other tenants, a tenant alone, and anybody while plenty is
free and nothing waits for lack of places, take places at once.
"""

from __future__ import annotations

from typing import Final

MORE: Final = 1.3
LEAST_SHARE: Final = 0.1
"""A tenant with less is never one that has too much, however many there are."""
FILL_SHARE: Final = 0.2
PLENTY_SHARE: Final = 0.25
"""Of all places: so many that are free are enough for everybody."""
KEPT_SHARE: Final = 0.05
"""Of all places: so many stay free. None of fewer than twenty."""
LOOK_SHARE: Final = 0.25
"""Of the time in which places are filled: when those that are kept free are looked at again."""
AT_ONCE: Final = 0.1
"""Of free places: at most, after a time in which there were none."""
MEMORY: Final = 256
"""Places that count as taken of late."""
MAX_REMEMBERED: Final = 1_024


class Filling:
    """`now` never decreases."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        """Places by tenant, of those that have any."""
        self.num_held = 0
        """The sum of these."""
        self._taken: dict[str, float] = {}
        """Places taken of late by tenant, each worth what `_weight` was."""
        self._total = 0.0
        self._weight = 1.0
        self._answer_s = 0.0
        self._allowance = 0.0
        self._at = 0.0
        self._due: float | None = None

    def taken(self, tenant: str, num_places: int) -> None:
        """`tenant` takes places; `left` follows once."""
        if self.has_too_much(tenant, 0):
            self._allowance = max(self._allowance - num_places, 0.0)
        self._held[tenant] = self._held.get(tenant, 0) + num_places
        self.num_held += num_places
        self._weight *= 1 + num_places / MEMORY
        self._taken[tenant] = self._taken.get(tenant, 0.0) + num_places * self._weight
        self._total += num_places * self._weight
        if self._weight > 1e100 or len(self._taken) > MAX_REMEMBERED:
            self._tidy()

    def left(self, tenant: str, num_places: int) -> None:
        """`tenant` has given places back."""
        self.num_held -= num_places
        if held := self._held[tenant] - num_places:
            self._held[tenant] = held
        else:
            del self._held[tenant]

    def answered(self, answer_s: float) -> None:
        """An answer took so long."""
        self._answer_s += (answer_s - self._answer_s) / 64 if self._answer_s else answer_s

    def may_go(self, tenant: str, now: float, num_free: int, *, is_held: bool) -> bool:
        """Say whether `tenant` may take one of so many free places; if not, look at `due`. `is_held`: others waited
        for lack of places."""
        if not self.has_too_much(tenant, num_free):
            return True
        if not is_held and num_free > PLENTY_SHARE * (num_free + self.num_held):
            return True
        return self._may_take(now, num_free)

    def has_too_much(self, tenant: str, num_free: int) -> bool:
        """Say whether it has more than its part now, or took more of late."""
        held, places = self._held.get(tenant, 0), num_free + self.num_held
        if len(self._held) > 1 and held > max(MORE / len(self._held), LEAST_SHARE) * places:
            return True
        if len(self._taken) < 2:
            return False
        own = self._taken.get(tenant, 0.0)
        if own <= LEAST_SHARE * self._total or own == self._total:
            return False
        num_active = sum(taken * 100 > self._total for taken in self._taken.values())
        return num_active > 1 and own * num_active > MORE * self._total

    def _may_take(self, now: float, num_free: int) -> bool:
        """Say so of one that has too much."""
        fill_s = FILL_SHARE * self._answer_s
        if not fill_s:
            return True
        if num_free <= int(KEPT_SHARE * (num_free + self.num_held)):
            self._due = now + LOOK_SHARE * fill_s
            return False
        elapsed, self._at = max(now - self._at, 0.0), now
        self._allowance = min(self._allowance + num_free * min(elapsed / fill_s, AT_ONCE), num_free)
        self._due = None if self._allowance > 1.0 - 1e-6 else now + (1.0 - self._allowance) * fill_s / max(num_free, 1)
        return self._due is None

    @property
    def due(self) -> float | None:
        """When the one that had to wait last may go; None if nobody had to."""
        return self._due

    def rest(self) -> None:
        """Nobody waits any more."""
        self._due = None

    def _tidy(self) -> None:
        least = self._total / (4 * MEMORY)
        self._taken = {name: taken / self._weight for name, taken in self._taken.items() if taken > least}
        if len(self._taken) > MAX_REMEMBERED:
            kept = sorted(self._taken, key=lambda name: self._taken[name])[-MAX_REMEMBERED // 2 :]
            self._taken = {name: self._taken[name] for name in kept}
        self._total = sum(self._taken.values())
        self._weight = 1.0
