"""How long to wait before the next try. Pure but for the dice, which a test can load."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Backoff:
    """Doubles from `first_s` up to `max_s`; the upper half is random, so that clients do not come back in step."""

    first_s: float = 0.05
    max_s: float = 2.0
    random: random.Random = field(default_factory=random.Random)

    def delay(self, num_failures: int) -> float:
        """Return the seconds before the try that follows `num_failures` failures in a row (at least 1)."""
        whole = min(self.max_s, self.first_s * 2.0 ** min(num_failures - 1, 32))
        return whole * (0.5 + 0.5 * self.random.random())
