"""How many replicas a model shall have: what is configured, and what follows from it and from demand.

`desired_replicas` is pure: demand, configuration, state and time in, a decision with its reason and the next state out.
It adds as soon as demand has exceeded what there is, with a tolerance, for `upscale_delay_s`, and takes away only what
the most demand of the last `downscale_delay_s` could do without, and would leave so much room that nothing is to be
added again. Light to import, for the actor that decides and for commands; knows no Ray, no router and no clock.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from workers.errors import ConfigError

DAYS: Final = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MAX_REPLICAS: Final = 1024
TOLERANCE: Final = 0.1
"""By this part demand may exceed the places there are before a replica is added, and must stay below what is left
before one is taken away."""
STEP_INTERVAL_S: Final = 1.0
"""Between decisions whose steps are limited."""
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

    def holds(self, at: datetime) -> bool:
        """Say whether it is that time."""
        minute = 60 * at.hour + at.minute
        if self.begin_minute < self.end_minute:
            return at.weekday() in self.days and self.begin_minute <= minute < self.end_minute
        if minute >= self.begin_minute:
            return at.weekday() in self.days
        return minute < self.end_minute and (at - timedelta(days=1)).weekday() in self.days


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

    def of_replicas(self, num_replicas: int, max_num_sequences: int) -> ScalingConfig:
        """Return the same with every 0 that stands for something else replaced."""
        filled = replace(self, target_sequences=self.target_sequences or float(max_num_sequences))
        return filled if self.is_elastic else filled.fixed(num_replicas)

    def fixed(self, num_replicas: int) -> ScalingConfig:
        """Return the same for exactly so many replicas, whatever happens."""
        return replace(self, min_replicas=num_replicas, max_replicas=num_replicas, schedule=())

    def minimum(self, now: float) -> int:
        """Return how many there must be at `now`, seconds since 1970."""
        if not self.schedule:
            return self.min_replicas
        at = datetime.fromtimestamp(now, UTC)
        scheduled = (entry for entry in map(ScheduledMinimum.parse, self.schedule) if entry.holds(at))
        return max(self.min_replicas, max((entry.num_replicas for entry in scheduled), default=0))

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What is asked of one model, by all routers."""

    sequences: float
    """Places that there should be."""
    at_most: float | None = None
    """Places that all could use that runs, waits or was turned away; None: as many. What is more than `sequences` adds
    no replica, but none is taken away while it is there."""
    is_idle: bool
    """Nothing runs, waits, or has come since the demand before."""
    cause: str = ""
    """What it follows from, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalerState:
    """What `desired_replicas` remembers of one model. Times in seconds, on one clock."""

    target: int
    heard_since: float | None = None
    """Since when demand has been known without a gap."""
    peaks: tuple[tuple[float, float], ...] = field(default=(), repr=False)
    """Times of the last `downscale_delay_s`, and the most that was asked for from each on: times rise, demands fall."""
    above_since: float | None = None
    """Since when more is needed than there is."""
    least_above: float = 0.0
    """The least demand since then."""
    idle_since: float | None = None
    stepped_at: float = -math.inf
    """When the target was last changed by demand."""


@dataclass(frozen=True, slots=True)
class Decision:
    target: int
    reason: str
    state: ScalerState


def desired_replicas(demand: Demand | None, config: ScalingConfig, state: ScalerState, now: float) -> Decision:
    """Return how many replicas there shall be at `now`, seconds since 1970 on a clock that never goes back.

    `demand`: None if it is not known, and then the number is held, within its bounds. `config` is of
    `ScalingConfig.of_replicas`. The state that is returned belongs into the next call.
    """
    low = config.minimum(now)
    high = max(config.max_replicas, low)
    state = _heard(state, demand, config, now)
    if state.target < low or state.target > high:
        target = min(max(state.target, low), high)
        word = "minimum" if target == low else "maximum"
        return _decided(target, f"the {word} is {target}" if low < high else f"{target} are asked for", state, now)
    if demand is None:
        return Decision(state.target, "held: no router has said anything lately", state)
    more = min(_raised(demand, config, state, now), high)
    if more > state.target:
        decision = _decided(more, _why(demand, config, more), state, now)
        if _needed(demand.sequences, config) <= more:
            return decision
        # It has grown meanwhile, and the next delay has begun with this.
        return replace(decision, state=replace(decision.state, above_since=now, least_above=demand.sequences))
    fewer = max(_lowered(config, state, now), low)
    if fewer < state.target:
        peak = f"{state.peaks[0][1]:.1f} sequences were the most in {config.downscale_delay_s:g} s"
        return _decided(fewer, peak if fewer else f"no request in {config.zero_delay_s:g} s", state, now)
    return Decision(state.target, _why(demand, config, state.target), state)


def _heard(state: ScalerState, demand: Demand | None, config: ScalingConfig, now: float) -> ScalerState:
    """Return the state that knows of `demand`."""
    if demand is None:
        return replace(state, heard_since=None, above_since=None, idle_since=None)
    most = demand.sequences if demand.at_most is None else max(demand.at_most, demand.sequences)
    peaks = [peak for peak in state.peaks if peak[0] > now - config.downscale_delay_s and peak[1] > most]
    is_above = _needed(demand.sequences, config) > state.target
    least = min(state.least_above, demand.sequences) if state.above_since is not None else demand.sequences
    return replace(
        state,
        heard_since=now if state.heard_since is None else state.heard_since,
        peaks=(*peaks, (now, most)),
        above_since=(now if state.above_since is None else state.above_since) if is_above else None,
        least_above=least if is_above else 0.0,
        idle_since=(now if state.idle_since is None else state.idle_since) if demand.is_idle else None,
    )


def _raised(demand: Demand, config: ScalingConfig, state: ScalerState, now: float) -> int:
    """Return the number that demand asks for by now, if it is more than there is."""
    if not state.target:
        # Whoever waits now waits for a start, so nobody waits for a second look.
        needed = _needed(demand.sequences, config) or int(not demand.is_idle)
    elif state.above_since is not None and now - state.above_since >= config.upscale_delay_s:
        needed = _needed(state.least_above, config)
    else:
        return state.target
    if not config.max_step_up:
        return needed
    if now - state.stepped_at < STEP_INTERVAL_S:
        return state.target
    return min(needed, state.target + config.max_step_up)


def _lowered(config: ScalingConfig, state: ScalerState, now: float) -> int:
    """Return the number that would have done for long enough, if it is less than there is."""
    if state.target <= 1:
        is_useless = state.idle_since is not None and now - state.idle_since >= config.zero_delay_s
        return 0 if is_useless else state.target
    if state.heard_since is None or now - state.heard_since < config.downscale_delay_s:
        return state.target
    needed = max(math.ceil(state.peaks[0][1] / (config.target_sequences * (1 - TOLERANCE))), 1)
    if not config.max_step_down:
        return needed
    if now - state.stepped_at < STEP_INTERVAL_S:
        return state.target
    return max(needed, state.target - config.max_step_down)


def _needed(sequences: float, config: ScalingConfig) -> int:
    """Return the fewest replicas that `sequences` do not exceed beyond the tolerance."""
    return math.ceil(sequences / (config.target_sequences * (1 + TOLERANCE)))


def _decided(target: int, reason: str, state: ScalerState, now: float) -> Decision:
    """What demand was before says nothing of whether the new number is too small."""
    return Decision(target, reason, replace(state, target=target, stepped_at=now, above_since=None, least_above=0.0))


def _why(demand: Demand, config: ScalingConfig, target: int) -> str:
    places = f"{config.target_sequences:g} a replica"
    cause = f" ({demand.cause})" if demand.cause else ""
    return f"{demand.sequences:.1f} sequences, {places}{cause}" if demand.sequences or target else "no request"
