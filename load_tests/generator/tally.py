"""What happened, counted: bounded in memory however many requests there are, and mergeable between processes.

A request ends in one of these ways, and `sent` is their sum once all have ended:

    ok          an answer came to its end
    cancelled   by the scenario, before its end
    refused     as it had to be (a poison request)
    failed      otherwise; `errors` says with which code and reason
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Self

from load_tests.generator.histogram import Histogram

MAX_GROUPS = 64
"""Tenants, kinds, replicas or reasons that are told apart; the rest is "others"."""
OTHERS = "others"
NUM_INTERVALS = 120

_HISTOGRAMS = ("per_token", "gap", "age", "lag", "queue")
ENDS = ("ok", "cancelled", "refused", "failed")
NO_TERMINAL = "NO_TERMINAL"
GENERATOR_FULL = "GENERATOR_FULL"
NOT_REFUSED = "NOT_REFUSED"


@dataclass(slots=True)
class Group:
    """Requests that have something in common. Times are those of `ok` ones."""

    sent: int = 0
    ok: int = 0
    good: int = 0
    cancelled: int = 0
    refused: int = 0
    failed: int = 0
    tokens: int = 0
    first_token: Histogram = field(default_factory=Histogram)
    total: Histogram = field(default_factory=Histogram)

    def merge(self, other: Group) -> None:
        _merge(self, other)

    def to_json(self) -> dict[str, Any]:
        return {name: _to_json(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        return cls(**{name: _from_json(each) for name, each in value.items()})


@dataclass(slots=True)
class ReplicaShare:
    """What one replica did, in tokens, as the usage of its answers says."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0

    @property
    def load(self) -> int:
        """What it computed."""
        return self.prompt_tokens - self.cached_tokens + self.generated_tokens


@dataclass(slots=True)
class Tally:
    """`interval_s` is the width of one entry of `intervals`, which are groups by time since the beginning."""

    interval_s: float
    all: Group = field(default_factory=Group)
    late: int = 0
    """Answered well after their deadline, which must not be."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    deltas: int = 0
    """In which tokens arrived; with `arrived` this says how many a message brings."""
    arrived: dict[int, int] = field(default_factory=dict)
    """Tokens by the interval in which they arrived."""
    per_token: Histogram = field(default_factory=Histogram)
    """Of each answer: (last token - first token) / (tokens - 1)."""
    gap: Histogram = field(default_factory=Histogram)
    """Between two arrivals of one answer."""
    age: Histogram = field(default_factory=Histogram)
    """Of tokens when they arrive, where the engine's tokens say the time."""
    lag: Histogram = field(default_factory=Histogram)
    """Between the planned and the real sending."""
    queue: Histogram = field(default_factory=Histogram)
    """In the router's queue, as the accounts of `ok` answers say."""
    last_end_s: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    replicas: dict[str, ReplicaShare] = field(default_factory=dict)
    kinds: dict[str, Group] = field(default_factory=dict)
    tenants: dict[str, Group] = field(default_factory=dict)
    intervals: dict[int, Group] = field(default_factory=dict)

    def groups(self, kind: str, tenant: str, at_s: float) -> tuple[Group, ...]:
        """Return the groups of a request that begins `at_s` after the beginning."""
        interval = min(int(at_s / self.interval_s), NUM_INTERVALS - 1)
        if interval not in self.intervals:
            self.intervals[interval] = Group()
        return (self.all, self.intervals[interval], _entry(self.kinds, kind), _entry(self.tenants, tenant))

    def arrive(self, num_tokens: int, at_s: float) -> None:
        """Count the tokens of one delta."""
        interval = min(int(at_s / self.interval_s), NUM_INTERVALS - 1)
        self.arrived[interval] = self.arrived.get(interval, 0) + num_tokens
        self.deltas += 1

    def error(self, reason: str) -> None:
        """Count an error by what it is, "CODE" or "CODE/REASON"."""
        self.errors[reason if reason in self.errors or len(self.errors) < MAX_GROUPS else OTHERS] += 1

    def replica(self, name: str) -> ReplicaShare:
        if name not in self.replicas and len(self.replicas) >= MAX_GROUPS:
            name = OTHERS
        return self.replicas.setdefault(name, ReplicaShare())

    def merge(self, other: Tally) -> None:
        """Count all that `other` has counted as well."""
        assert self.interval_s == other.interval_s
        self.all.merge(other.all)
        for name in _HISTOGRAMS:
            getattr(self, name).merge(getattr(other, name))
        for name in ("late", "prompt_tokens", "cached_tokens", "deltas"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.last_end_s = max(self.last_end_s, other.last_end_s)
        for reason, count in other.errors.items():
            self.errors[reason] += count
        for name, share in other.replicas.items():
            _merge(self.replica(name), share)
        for mine, theirs in ((self.kinds, other.kinds), (self.tenants, other.tenants)):
            for name, group in theirs.items():
                _entry(mine, name).merge(group)
        for interval, num_tokens in other.arrived.items():
            self.arrived[interval] = self.arrived.get(interval, 0) + num_tokens
        for interval, group in other.intervals.items():
            self.intervals.setdefault(interval, Group()).merge(group)

    def to_json(self) -> dict[str, Any]:
        return {name: _to_json(getattr(self, name)) for name in self.__slots__}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        plain = ("interval_s", "late", "prompt_tokens", "cached_tokens", "deltas", "last_end_s")
        return cls(
            **{name: value[name] for name in plain},
            per_token=Histogram.from_json(value["per_token"]),
            gap=Histogram.from_json(value["gap"]),
            age=Histogram.from_json(value["age"]),
            lag=Histogram.from_json(value["lag"]),
            queue=Histogram.from_json(value["queue"]),
            all=Group.from_json(value["all"]),
            arrived={int(number): count for number, count in value["arrived"].items()},
            errors=Counter(value["errors"]),
            replicas={name: ReplicaShare(**each) for name, each in value["replicas"].items()},
            kinds={name: Group.from_json(each) for name, each in value["kinds"].items()},
            tenants={name: Group.from_json(each) for name, each in value["tenants"].items()},
            intervals={int(number): Group.from_json(each) for number, each in value["intervals"].items()},
        )


def _entry(groups: dict[str, Group], name: str) -> Group:
    if name not in groups:
        if len(groups) >= MAX_GROUPS:
            name = OTHERS
        groups.setdefault(name, Group())
    return groups[name]


def _merge(mine: Any, theirs: Any) -> None:
    for name in mine.__slots__:
        value = getattr(mine, name)
        if isinstance(value, Histogram):
            value.merge(getattr(theirs, name))
        else:
            setattr(mine, name, value + getattr(theirs, name))


def _to_json(value: Any) -> Any:
    if isinstance(value, Histogram):
        return value.to_json()
    if isinstance(value, dict):
        return {str(key): _to_json(each) for key, each in value.items()}
    if hasattr(value, "__slots__"):
        return {name: _to_json(getattr(value, name)) for name in value.__slots__}
    return value


def _from_json(value: Any) -> Any:
    return Histogram.from_json(value) if isinstance(value, dict) else value
