"""How much a tenant may ask for: requests and tokens a minute, as token buckets that hold one minute's worth. Pure.

A request is charged for its prompt and all that it may generate when it is taken on, and gets back what it did not use
when it ends: who starts many at once cannot spend more than there is. One that is larger than a whole bucket is taken
on when that is full. Remembers only tenants with a quota, until their buckets are full again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from octavo.names import Reason

from router.keyring import Terms
from workers.errors import OverloadedError

PERIOD_S = 60.0
SWEEP_SIZE = 1_024
"""So many tenants are remembered before the full buckets among them are looked for."""


@dataclass(frozen=True, slots=True)
class Charge:
    """What a request took; `Quotas.settle` or `Quotas.refund` takes it, once."""

    tenant: str
    num_tokens: int


class Quotas:
    def __init__(self) -> None:
        self._tenants: dict[str, _Buckets] = {}
        self._sweep_at = SWEEP_SIZE

    def charge(self, tenant: str, terms: Terms, num_tokens: int, now: float) -> Charge | None:
        """Take a request with at most `num_tokens`, prompt and answer; None without a quota. Raises OverloadedError
        with the time after which there is enough."""
        if math.isinf(terms.requests_per_minute) and math.isinf(terms.tokens_per_minute):
            return None
        buckets = self._tenants.get(tenant)
        if buckets is None:
            self._sweep(now)
            buckets = self._tenants[tenant] = _Buckets()
        for bucket, amount, per_minute, what in (
            (buckets.requests, 1.0, terms.requests_per_minute, "requests"),
            (buckets.tokens, float(num_tokens), terms.tokens_per_minute, "tokens"),
        ):
            bucket.refill(per_minute, now)
            if (wait_s := bucket.wait_s(amount)) > 0:
                raise OverloadedError(
                    f"the tenant's quota is {per_minute:g} {what} a minute; this request needs {amount:g}, which are "
                    f"there in {wait_s:.1f} s",
                    reason=Reason.QUOTA_EXCEEDED,
                    retry_after_s=wait_s,
                )
        buckets.requests.level -= 1.0
        buckets.tokens.level -= num_tokens
        return Charge(tenant, num_tokens)

    def settle(self, charge: Charge, num_used: int) -> None:
        """Give back what a request that has ended did not use."""
        buckets = self._tenants.get(charge.tenant)
        if buckets is not None:
            buckets.tokens.level += charge.num_tokens - num_used

    def refund(self, charge: Charge) -> None:
        """Give back all that was taken for a request that was not taken on."""
        buckets = self._tenants.get(charge.tenant)
        if buckets is not None:
            buckets.requests.level += 1.0
            buckets.tokens.level += charge.num_tokens

    def __len__(self) -> int:
        return len(self._tenants)

    def _sweep(self, now: float) -> None:
        if len(self._tenants) >= self._sweep_at:
            for tenant, buckets in list(self._tenants.items()):
                if buckets.is_full(now):
                    del self._tenants[tenant]
            self._sweep_at = max(SWEEP_SIZE, 2 * len(self._tenants))


class _Buckets:
    __slots__ = ("requests", "tokens")

    def __init__(self) -> None:
        self.requests = _Bucket()
        self.tokens = _Bucket()

    def is_full(self, now: float) -> bool:
        return self.requests.is_full(now) and self.tokens.is_full(now)


class _Bucket:
    """`level` may fall below 0 by what was larger than the whole bucket."""

    __slots__ = ("_at", "_capacity", "level")

    def __init__(self) -> None:
        self.level = math.inf
        self._at = -math.inf
        self._capacity = math.inf

    def refill(self, capacity: float, now: float) -> None:
        if math.isinf(capacity) or math.isinf(self.level):
            self.level = capacity
        else:
            self.level = min(capacity, self.level + max(now - self._at, 0.0) * capacity / PERIOD_S)
        self._capacity, self._at = capacity, now

    def wait_s(self, amount: float) -> float:
        """Return after how many seconds there is `amount`; not above 0: now."""
        lack = min(amount, self._capacity) - self.level
        return 0.0 if math.isinf(self._capacity) else lack * PERIOD_S / self._capacity

    def is_full(self, now: float) -> bool:
        gained = max(now - self._at, 0.0) * self._capacity / PERIOD_S
        return math.isinf(self._capacity) or self.level + gained >= self._capacity
