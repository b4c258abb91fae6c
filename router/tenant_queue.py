"""What one tenant has waiting at one priority: who of it goes next, and whether one more would be in time. Pure.

Whose deadline would be missed if all that waits here went before it presses, and goes first, the least slack first; all
others go by arrival. While requests without a deadline of their own wait, at most `JUMPS` tokens that press go before
each token of theirs, so that deadlines do not starve them.
"""

from __future__ import annotations

import math
from collections import defaultdict

from router.drain import Drain
from router.queued import Queued
from router.removable_heap import RemovableHeap

JUMPS = 7
MAX_HORIZON_S = 1e9
"""Instead of an infinite one, by which requests without a deadline would press."""
SLICE_S = 0.1
"""How finely work with deadlines is kept by time."""
FORESIGHT = 128
"""Slices ahead, for which those that were taken on before are protected from newcomers."""
HINDSIGHT = 16
"""Slices back, of what should have gone and has not."""


class TenantQueue:
    """`clock` is how far this tenant has come in its class's fair share, in tokens; its owner moves it."""

    __slots__ = (
        "_dated",
        "_jumped",
        "_queued",
        "_undated",
        "_waiting",
        "_work",
        "clock",
        "cost",
        "drain",
        "number",
        "tenant",
    )

    def __init__(self, tenant: str, number: int, clock: float) -> None:
        self.tenant = tenant
        self.number = number
        self.clock = clock
        self.drain = Drain()
        self._queued: dict[int, Queued] = {}
        self._waiting = RemovableHeap()
        """All by arrival."""
        self._undated = RemovableHeap()
        """Those without a deadline of their own, by arrival."""
        self._dated = RemovableHeap()
        """Those with one, by their latest start."""
        self._work: defaultdict[int, int] = defaultdict(int)
        """Tokens of the dated ones, by slice of their latest start."""
        self.cost = 0
        """Of all that waits."""
        self._jumped = 0
        """Tokens that went before the undated ones, beyond what these may be made to wait for."""

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def latest_start(self) -> float:
        """Of the one with the least slack; infinite without any deadline."""
        first = self._dated.first()
        return math.inf if first is None else first[0]

    def add(self, queued: Queued) -> None:
        key, arrival = queued.key, queued.request.accepted_at
        self._queued[key] = queued
        self.cost += queued.cost
        self._waiting.push(key, arrival)
        if queued.latest_start == math.inf:
            self._undated.push(key, arrival)
        else:
            self._dated.push(key, queued.latest_start)
            self._work[_slice(queued.latest_start)] += queued.cost

    def remove(self, key: int) -> Queued:
        queued = self._queued.pop(key)
        self.cost -= queued.cost
        self._waiting.discard(key)
        self._undated.discard(key)
        self._dated.discard(key)
        if queued.latest_start != math.inf:
            at = _slice(queued.latest_start)
            self._work[at] -= queued.cost
            if not self._work[at]:
                del self._work[at]
        if not self._undated:
            self._jumped = 0
        return queued

    def next(self, now: float, horizon_s: float) -> Queued:
        """Return who goes next, if all that waits here takes `horizon_s`. There is one."""
        if self.presses(now, horizon_s):
            undated = self._undated.first()
            if undated is None or self._jumped < JUMPS * self._queued[undated[1]].cost:
                dated = self._dated.first()
                assert dated is not None
                return self._queued[dated[1]]
            return self._queued[undated[1]]
        first = self._waiting.first()
        assert first is not None
        return self._queued[first[1]]

    def presses(self, now: float, horizon_s: float) -> bool:
        """Say whether one with a deadline would be late if all that waits here, for `horizon_s`, went before it."""
        return self.latest_start <= now + min(horizon_s, MAX_HORIZON_S)

    def went(self, queued: Queued) -> None:
        """`queued` was chosen and removed."""
        if queued.latest_start == math.inf:
            self._jumped = max(0, self._jumped - JUMPS * queued.cost)
        elif self._undated:
            self._jumped += queued.cost

    def shortfall_s(self, cost: int, latest_start: float, now: float, per_second: float) -> float:
        """Return by how much one more of `cost`, or one that was taken on before, would start too late, if those with
        deadlines go in the order of their latest starts, `per_second` tokens of them. Not above 0: nobody would."""
        if not self._dated:
            return 0.0
        per_second *= JUMPS / (JUMPS + 1) if self._undated else 1.0
        own, first = _slice(latest_start), _slice(now)
        ahead, worst = 0, now - latest_start if own < first - HINDSIGHT else -math.inf
        for at in sorted({own, *self._work}):
            if at >= first + FORESIGHT:
                break
            work = self._work.get(at, 0)
            if at == own:
                worst = max(worst, (ahead + work) / per_second - (latest_start - now))
                ahead += cost
            elif at > own:
                worst = max(worst, (ahead + work) / per_second - ((at + 1) * SLICE_S - now))
            ahead += work
        if own >= first + FORESIGHT:
            worst = sum(self._work.values()) / per_second - (latest_start - now)
        return worst

    def check_integrity(self) -> None:
        """Assert every invariant; for tests."""
        for heap in (self._waiting, self._undated, self._dated):
            heap.check_integrity()
        assert len(self._waiting) == len(self._queued) == len(self._undated) + len(self._dated)
        assert sum(self._work.values()) == sum(q.cost for q in self._queued.values() if q.key in self._dated)
        assert all(work > 0 for work in self._work.values())
        assert self.cost == sum(queued.cost for queued in self._queued.values())
        assert self._jumped == 0 or self._undated


def _slice(at: float) -> int:
    return int(at / SLICE_S)
