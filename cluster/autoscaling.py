"""How many replicas a model shall have: what is configured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from workers.errors import ConfigError

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_REPLICAS: Final = 1024
_ENTRY: Final = re.compile(r"([a-z]{3})(?:-([a-z]{3}))? (\d\d):(\d\d)-(\d\d):(\d\d) (\d+)")


@dataclass(frozen=True, slots=True)
class ScheduledMinimum:
    """At least so many replicas from one minute of the day to another, in UTC, on some days of the week (0: Monday).
    One that ends before it begins goes on into the day after."""

    days: frozenset[int]
    begin_minute: int
    end_minute: int
    num_replicas: int

    @classmethod
    def parse(cls, text: str) -> ScheduledMinimum:
        """Return what ``mon-fri 08:00-18:00 3`` says. Raises ValueError for anything else."""
        found = _ENTRY.fullmatch(text)
        if found is None:
            raise ValueError(text)
        first, last, *times, count = found.groups()
        begin, end = DAYS.index(first), DAYS.index(last or first)
        hours, minutes = [int(times[i]) for i in (0, 2)], [int(times[i]) for i in (1, 3)]
        begin_minute, end_minute = (60 * hour + minute for hour, minute in zip(hours, minutes, strict=True))
        if max(minutes) > 59 or max(begin_minute, end_minute) > 24 * 60:
            raise ValueError(text)
        days = frozenset((begin + i) % 7 for i in range((end - begin) % 7 + 1))
        return cls(days, begin_minute, end_minute, int(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """The section `[scaling]`."""

    max_replicas: int = 0
    """0: as many as replicas.num_replicas, always."""
    min_replicas: int = 1
    """0: down to none, after `zero_delay_s` without a request."""
    target_sequences: float = 0.0
    """Running and waiting sequences that are a replica's part; 0: engine.max_num_sequences."""
    upscale_delay_s: float = 0.25
    """How long more must be needed before there are more."""
    downscale_delay_s: float = 60.0
    """How long fewer must do before there are fewer."""
    zero_delay_s: float = 300.0
    """How long there must be nothing to do before the last replica goes."""
    max_step_up: int = 0
    """Replicas that one decision may add; 0: any number."""
    max_step_down: int = 1
    """Replicas that one decision may take away; 0: any number."""
    schedule: tuple[str, ...] = ()
    """Minimums by the clock, each as "mon-fri 08:00-18:00 3", in UTC."""

    @property
    def is_elastic(self) -> bool:
        """Whether load decides how many replicas there are."""
        return self.max_replicas > 0

    def check(self) -> None:
        """Raises ConfigError with the rule and the value."""
        rules = [
            (0 <= self.max_replicas <= MAX_REPLICAS, "max_replicas", f"must be in [0, {MAX_REPLICAS}]"),
            (self.min_replicas >= 0, "min_replicas", "must be >= 0"),
            (
                not self.is_elastic or self.min_replicas <= self.max_replicas,
                "min_replicas",
                f"must be <= scaling.max_replicas ({self.max_replicas})",
            ),
            (self.target_sequences >= 0, "target_sequences", "must be >= 0"),
            (self.upscale_delay_s >= 0, "upscale_delay_s", "must be >= 0"),
            (self.downscale_delay_s >= 0, "downscale_delay_s", "must be >= 0"),
            (self.zero_delay_s >= 0, "zero_delay_s", "must be >= 0"),
            (self.max_step_up >= 0, "max_step_up", "must be >= 0"),
            (self.max_step_down >= 0, "max_step_down", "must be >= 0"),
        ]
        for holds, key, rule in rules:
            if not holds:
                raise ConfigError(f"scaling.{key} {rule}, is {getattr(self, key)!r}")
        for entry in self.schedule:
            _check_entry(entry, self.max_replicas)


def _check_entry(entry: str, max_replicas: int) -> None:
    try:
        minimum = ScheduledMinimum.parse(entry)
    except ValueError:
        raise ConfigError(
            f'scaling.schedule must have entries like "mon-fri 08:00-18:00 3" (UTC), has {entry!r}'
        ) from None
    if minimum.num_replicas > max_replicas:
        raise ConfigError(f"scaling.schedule must ask for at most scaling.max_replicas ({max_replicas}), has {entry!r}")
