"""How many tokens replicas compute in a second, from what their loads count. Pure; `now` is in seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from router.types import ReplicaView

WINDOW_S: Final = 2.0


class _Sample(NamedTuple):
    at: float
    epoch: int
    num_tokens: int


class TokenRates:
    """Over about the last `WINDOW_S`, if `sample` is called more often than that."""

    def __init__(self) -> None:
        self._samples: dict[str, list[_Sample]] = {}

    def sample(self, views: Iterable[ReplicaView], now: float) -> None:
        """Take note of how far all replicas are; those that are not named are forgotten."""
        samples = {}
        for view in views:
            new = _Sample(now, view.epoch, view.load.num_computed_tokens)
            old = [each for each in self._samples.get(view.replica_id, ()) if _precedes(each, new)]
            while len(old) > 1 and old[1].at <= now - WINDOW_S:
                del old[0]
            samples[view.replica_id] = [*old, new]
        self._samples = samples

    def per_second(self, replica_id: str) -> float:
        """Return 0 before there are two samples."""
        samples = self._samples.get(replica_id, ())
        if len(samples) < 2 or samples[-1].at <= samples[0].at:
            return 0.0
        first, last = samples[0], samples[-1]
        return (last.num_tokens - first.num_tokens) / (last.at - first.at)


def _precedes(sample: _Sample, new: _Sample) -> bool:
    """Say whether both count from the same beginning."""
    return sample.epoch == new.epoch and sample.num_tokens <= new.num_tokens
