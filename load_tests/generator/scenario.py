"""What to send, as a TOML file says it: arrivals, kinds of traffic, limits, what counts as good, what must hold.

Everything here is frozen and checked when it is read: a `Scenario` that exists can be run. Lengths are in tokens where
prompts are token ids, and in words where they are text or messages.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from load_tests.generator.arrivals import Arrivals, TraceLine, read_trace
from load_tests.generator.fields import ScenarioError, Span, read_table, require
from load_tests.generator.poisons import POISONS
from load_tests.generator.threshold import Threshold

FOLDER = Path(__file__).parents[1] / "scenarios"
FORMS = ("token_ids", "text", "messages")
CALLS = ("session", "generate")
MAX_REQUESTS = 10_000_000
MAX_LENGTH = 100_000
MAX_CONVERSATION = 1_000
_AT_ONCE, _SOON, _ONE, _SHORT = Span(0, 0), Span(0, 1), Span(1, 1), Span(32, 32)
_WORDS = Span(300, 1_000)
"""Token ids that the fake model and every real one have, and that are not special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape:
    """A prompt is system prompt, documents, what was said before, and what is its own; equal numbers, equal content."""

    form: str = "token_ids"
    system: int = 0
    """Length of the system prompt."""
    systems: int = 1
    """How many different ones there are. With several tenants each has its own, as far as they go."""
    document: int = 0
    documents: int = 0
    """How many there are to choose from."""
    picked: int = 1
    """How many of them a conversation is about."""
    own: Span = _SHORT
    """Length of each turn's own part, which no other request has."""
    vocabulary: Span = _WORDS
    """Token ids are drawn from [low, high)."""

    def check(self, key: str) -> None:
        require(self.form in FORMS, f"{key}.form", f"must be one of {', '.join(FORMS)}", self.form)
        for name in ("system", "document"):
            value = getattr(self, name)
            require(0 <= value <= MAX_LENGTH, f"{key}.{name}", f"must be in [0, {MAX_LENGTH}]", value)
        require(1 <= self.systems <= 1_000_000, f"{key}.systems", "must be in [1, 1000000]", self.systems)
        require(0 <= self.documents <= 1_000_000, f"{key}.documents", "must be in [0, 1000000]", self.documents)
        rule = f"must be in [0, documents = {self.documents}]"
        require(0 <= self.picked <= max(1, self.documents), f"{key}.picked", rule, self.picked)
        require(
            self.own.low >= 1 and self.own.high <= MAX_LENGTH, f"{key}.own", f"must be in [1, {MAX_LENGTH}]", self.own
        )
        rule = "must be two token ids in ascending order"
        require(self.vocabulary.low + 1 < self.vocabulary.high <= 2**31, f"{key}.vocabulary", rule, self.vocabulary)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One kind of traffic. Each arrival is of one kind, drawn by weight, and of one tenant, drawn by `zipf`."""

    name: str
    weight: float = 1.0
    prompt: PromptShape = PromptShape()
    output: Span = _SHORT
    """max_tokens."""
    turns: Span = _ONE
    """Each after the first asks on, `think_s` after the answer to the one before, with all that was said."""
    think_s: Span = _AT_ONCE
    tenants: int = 1
    zipf: float = 0.0
    """How unequal tenants and documents are: number i is drawn in proportion to 1 / i ** zipf."""
    timeout_s: Span | None = None
    cancel_share: float = 0.0
    cancel_after_s: Span = _SOON
    read_pause_s: float = 0.0
    """How long a slow reader waits after each read; its times per token are its own doing and are not counted."""
    priority: int = 0
    is_sticky: bool = False
    """Whether the turns of a conversation carry an affinity key."""
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    ignore_eos: bool = True
    poisons: tuple[str, ...] = ()
    """Every request breaks one of these rules and must be refused."""

    def check(self, key: str) -> None:
        require(self.name.isidentifier(), f"{key}.name", "must be a word", self.name)
        require(self.weight > 0, f"{key}.weight", "must be > 0", self.weight)
        self.prompt.check(f"{key}.prompt")
        require(self.output.low >= 1 and self.output.high <= MAX_LENGTH, f"{key}.output", "must be >= 1", self.output)
        rule = f"must be in [1, {MAX_CONVERSATION}]"
        require(self.turns.low >= 1 and self.turns.high <= MAX_CONVERSATION, f"{key}.turns", rule, self.turns)
        require(1 <= self.tenants <= 100_000, f"{key}.tenants", "must be in [1, 100000]", self.tenants)
        require(0 <= self.zipf <= 5, f"{key}.zipf", "must be in [0, 5]", self.zipf)
        require(self.timeout_s is None or self.timeout_s.low > 0, f"{key}.timeout_s", "must be > 0", self.timeout_s)
        require(0 <= self.cancel_share <= 1, f"{key}.cancel_share", "must be in [0, 1]", self.cancel_share)
        require(0 <= self.read_pause_s <= 60, f"{key}.read_pause_s", "must be in [0, 60]", self.read_pause_s)
        require(-100 <= self.priority <= 100, f"{key}.priority", "must be in [-100, 100]", self.priority)
        require(0 <= self.temperature <= 2, f"{key}.temperature", "must be in [0, 2]", self.temperature)
        for poison in self.poisons:
            require(poison in POISONS, f"{key}.poisons", f"must be among {', '.join(POISONS)}", poison)


@dataclass(frozen=True, slots=True, kw_only=True)
class Calling:
    """The table ``[call]``: how requests reach the router."""

    kind: str = "session"
    streams: int = 1
    """Of one process: Sessions, or connections for Generate."""
    window: int = 1_024
    """Session only: tokens of a request that may be unread."""
    retry_s: float = 0.0
    """Session only: how long a request that was turned away is tried again; 0: that is an error, and is counted."""
    model: str = ""
    tenant_header: str = ""
    """Generate only: the metadata key that carries the tenant's name. A Session has one identity."""

    def check(self) -> None:
        require(self.kind in CALLS, "call.kind", f"must be one of {', '.join(CALLS)}", self.kind)
        require(1 <= self.streams <= 256, "call.streams", "must be in [1, 256]", self.streams)
        require(self.window >= 1, "call.window", "must be >= 1", self.window)
        require(self.retry_s >= 0, "call.retry_s", "must be >= 0", self.retry_s)
        rule = "needs call.kind = 'generate', since a Session has one identity"
        require(not self.tenant_header or self.kind == "generate", "call.tenant_header", rule, self.tenant_header)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What no run goes beyond."""

    requests: int = 100_000
    in_flight: int = 4_096
    """Of all processes together; an open loop's arrival beyond it is not sent and counts as error GENERATOR_FULL."""
    drain_s: float = 30.0
    """After the last arrival; what has not ended by then is cancelled and counts as error NO_TERMINAL."""

    def check(self) -> None:
        require(1 <= self.requests <= MAX_REQUESTS, "limits.requests", f"must be in [1, {MAX_REQUESTS}]", self.requests)
        require(1 <= self.in_flight <= 100_000, "limits.in_flight", "must be in [1, 100000]", self.in_flight)
        require(0 < self.drain_s <= 600, "limits.drain_s", "must be in (0, 600]", self.drain_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The table ``[slo]``: a request that ended well within all of it is good. Goodput counts these."""

    first_token_s: float | None = None
    per_token_s: float | None = None
    total_s: float | None = None

    def check(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            require(value is None or value > 0, f"slo.{name}", "must be > 0", value)

    def is_met(self, first_token_s: float, per_token_s: float, total_s: float) -> bool:
        return (
            (self.first_token_s is None or first_token_s <= self.first_token_s)
            and (self.per_token_s is None or per_token_s <= self.per_token_s)
            and (self.total_s is None or total_s <= self.total_s)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenClock:
    """The table ``[clock]``: the engine's tokens say when they were made, as those of rigs/router_clock.py do:

        token id = first + floor(CLOCK_MONOTONIC in seconds * ticks_per_s) % ticks

    With it the age of each token at the client is measured, up to ticks / ticks_per_s seconds."""

    first: int
    ticks: int
    ticks_per_s: int

    def check(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            require(value >= 1, f"clock.{name}", "must be >= 1", value)

    def age_s(self, token_id: int, now: float) -> float:
        """Return how long before `now` the token was made."""
        return ((now * self.ticks_per_s - (token_id - self.first)) % self.ticks) / self.ticks_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A whole scenario; read it with `read_scenario` or `parse_scenario`."""

    name: str
    arrivals: Arrivals
    kinds: tuple[Kind, ...]
    about: str = ""
    seed: int = 1
    processes: int = 1
    """That share the load; each is one event loop and takes about one core at most."""
    call: Calling = Calling()
    limits: Limits = Limits()
    slo: Objective = Objective()
    clock: TokenClock | None = None
    thresholds: tuple[str, ...] = ()
    """For instance "first_token_s.p99 <= 0.5"; the figures are those of the report."""
    trace: tuple[TraceLine, ...] = field(default=(), repr=False)

    def check(self) -> None:
        """Raises ScenarioError with the key, the rule and the value."""
        require(bool(self.name), "name", "must not be empty", self.name)
        require(1 <= self.processes <= 64, "processes", "must be in [1, 64]", self.processes)
        for part in (self.arrivals, self.call, self.limits, self.slo):
            part.check()
        if self.clock is not None:
            self.clock.check()
        require(bool(self.kinds), "kinds", "must have at least one", self.kinds)
        names = [kind.name for kind in self.kinds]
        require(len(set(names)) == len(names), "kinds", "must have different names", names)
        for position, kind in enumerate(self.kinds):
            kind.check(f"kinds[{position}]")
        for text in self.thresholds:
            Threshold.parse(text)


def read_scenario(name: str, changes: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Path]:
    """Return the table of a scenario of this folder, or of a file, with `changes` ("arrivals.rate": 5), and where the
    files that it names are. Raises ScenarioError if it cannot be read or run."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(each.stem for each in FOLDER.glob("*.toml")))
        raise ScenarioError(f"there is no scenario {name!r} ({error.strerror}); there are {known}") from error
    except ValueError as error:
        raise ScenarioError(f"{path} is not TOML: {error}") from error
    for key, value in (changes or {}).items():
        *tables, last = key.split(".")
        owner = table
        for each in tables:
            owner = owner.setdefault(each, {})
        owner[last] = value
    parse_scenario(table, path.parent)
    return table, path.parent


def parse_scenario(table: Mapping[str, Any], folder: Path) -> Scenario:
    """Return the scenario that a table describes; traces lie in `folder`. Raises ScenarioError."""
    require("trace" not in table, "trace", "must be given as arrivals.file", table.get("trace"))
    scenario = read_table(Scenario, table)
    scenario.check()
    if not scenario.arrivals.file:
        return scenario
    return replace(scenario, trace=read_trace(folder / scenario.arrivals.file))
