"""What a router has heard last of the cluster's scaling, for those in it whom it concerns. Empty once it is old."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from router.signal import ModelOutlook, Outlook, RouterReport

MAX_AGE_S: Final = 2.0


class LastOutlook:
    """`clock` is in seconds. Used on one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._outlook = Outlook()
        self._heard_at = clock()

    def heard(self, outlook: Outlook) -> None:
        self._outlook = outlook
        self._heard_at = self._clock()

    def model(self, name: str) -> ModelOutlook | None:
        """Return what holds for a model now; None if nothing is known."""
        age_s = self._clock() - self._heard_at
        outlook = self._outlook.models.get(name) if age_s <= MAX_AGE_S else None
        if outlook is None or outlook.ready_in_s is None:
            return outlook
        return replace(outlook, ready_in_s=max(outlook.ready_in_s - age_s, 0.0))

    @property
    def routers(self) -> tuple[RouterReport, ...]:
        """What all routers say of themselves."""
        return self._outlook.routers if self._clock() - self._heard_at <= MAX_AGE_S else ()

    @property
    def signal_metrics(self) -> tuple[str, str]:
        """Where `octavo-signal` tells its metrics, and on which node."""
        return self._outlook.metrics_address, self._outlook.node_id

    @property
    def overrides(self) -> dict[str, int]:
        """What operators have asked for, also if that is old."""
        models = self._outlook.models.items()
        return {name: outlook.override for name, outlook in models if outlook.override is not None}
