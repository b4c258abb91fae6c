"""When requests arrive: offsets in seconds from the beginning of a run, in ascending order, a pure function of a seed.

    constant   every 1 / rate seconds
    poisson    independent of one another, `rate` a second on average
    bursts     `size` within `spread_s`, bursts as a Poisson process; `rate` requests a second on average
    ramp       a Poisson process whose rate goes in a straight line from `from_rate` to `rate`
    trace      as recorded, `speed` times as fast; the trace also says how long prompts and answers are
    closed     no schedule: each of `concurrency` users asks again when answered, `think_s` later

All but the last are open loops: what the server does changes nothing about when the next request arrives.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from load_tests.generator.fields import ScenarioError, Span, require

PROCESSES = ("constant", "poisson", "bursts", "ramp", "trace", "closed")
MAX_DURATION_S = 3600.0
MAX_TRACE_LINES = 1_000_000
_AT_ONCE = Span(0, 0)


@dataclass(frozen=True, slots=True)
class TraceLine:
    """One recorded request; lengths as in a kind of the scenario (`prompt.own` and `output`)."""

    at_s: float
    prompt: int
    output: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """The table ``[arrivals]`` of a scenario."""

    process: str
    duration_s: float
    """After this nothing new is sent."""
    rate: float = 0.0
    """Requests a second; of conversations, where those have several turns."""
    size: int = 10
    spread_s: float = 0.0
    from_rate: float = 0.0
    file: str = ""
    """Of a trace, relative to the scenario: CSV with the columns at_s, prompt, output."""
    speed: float = 1.0
    concurrency: int = 1
    think_s: Span = _AT_ONCE

    @property
    def is_open(self) -> bool:
        return self.process != "closed"

    def check(self) -> None:
        """Raises ScenarioError."""
        require(self.process in PROCESSES, "arrivals.process", f"must be one of {', '.join(PROCESSES)}", self.process)
        rule = f"must be in (0, {MAX_DURATION_S:g}]"
        require(0 < self.duration_s <= MAX_DURATION_S, "arrivals.duration_s", rule, self.duration_s)
        if self.process in ("constant", "poisson", "bursts", "ramp"):
            require(0 < self.rate <= 1e5, "arrivals.rate", "must be in (0, 100000]", self.rate)
        else:
            require(self.rate == 0, "arrivals.rate", f"must not be given for a process of {self.process!r}", self.rate)
        require(self.from_rate >= 0, "arrivals.from_rate", "must be >= 0", self.from_rate)
        require(self.size >= 1, "arrivals.size", "must be >= 1", self.size)
        require(self.spread_s >= 0, "arrivals.spread_s", "must be >= 0", self.spread_s)
        require(self.speed > 0, "arrivals.speed", "must be > 0", self.speed)
        require(
            self.concurrency == 1 or not self.is_open, "arrivals.concurrency", "is for closed loops", self.concurrency
        )
        require(1 <= self.concurrency <= 100_000, "arrivals.concurrency", "must be in [1, 100000]", self.concurrency)
        require((self.process == "trace") == bool(self.file), "arrivals.file", "must be given for a trace", self.file)

    def with_rate(self, rate: float) -> Arrivals:
        """Return these arrivals with `rate` requests a second on average. Raises ScenarioError if they have none."""
        if self.process in ("trace", "closed"):
            raise ScenarioError(f"arrivals.process must have a rate to change it, is {self.process!r}")
        return dataclasses.replace(self, rate=rate, from_rate=self.from_rate * rate / self.rate)

    def offsets(self, seed: str, trace: tuple[TraceLine, ...] = ()) -> Iterator[float]:
        """Yield the arrivals before `duration_s` of an open loop."""
        rng = random.Random(seed)
        processes = {"constant": self._constant, "poisson": self._poisson, "bursts": self._bursts, "ramp": self._ramp}
        offsets = (
            (line.at_s / self.speed for line in trace) if self.process == "trace" else processes[self.process](rng)
        )
        for offset in offsets:
            if offset >= self.duration_s:
                return
            yield offset

    def _constant(self, rng: random.Random) -> Iterator[float]:
        number = 0
        while True:
            yield number / self.rate
            number += 1

    def _poisson(self, rng: random.Random) -> Iterator[float]:
        at = 0.0
        while True:
            at += rng.expovariate(self.rate)
            yield at

    def _bursts(self, rng: random.Random) -> Iterator[float]:
        at = 0.0
        ahead: list[float] = []
        while True:
            at += rng.expovariate(self.rate / self.size)
            ahead += (at + rng.random() * self.spread_s for _ in range(self.size))
            ahead.sort()
            # The next burst begins no sooner than this one, so what lies before it is final.
            while ahead and ahead[0] <= at:
                yield ahead.pop(0)

    def _ramp(self, rng: random.Random) -> Iterator[float]:
        """Invert the expected number of arrivals until t, a t + (b - a) t² / 2T, at the points of a unit process."""
        slope = (self.rate - self.from_rate) / self.duration_s
        expected = 0.0
        while True:
            expected += rng.expovariate(1.0)
            root = self.from_rate**2 + 2 * slope * expected
            if root < 0:  # a falling ramp whose arrivals are used up
                return
            yield expected / self.from_rate if slope == 0 else (math.sqrt(root) - self.from_rate) / slope


def read_trace(path: Path) -> tuple[TraceLine, ...]:
    """Return the lines of a trace, the first at 0. Raises ScenarioError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            lines = [TraceLine(float(row["at_s"]), int(row["prompt"]), int(row["output"])) for row in rows]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ScenarioError(f"{path} is not a trace with the columns at_s, prompt, output: {error!r}") from error
    rule = f"must have 1 to {MAX_TRACE_LINES} lines"
    require(0 < len(lines) <= MAX_TRACE_LINES, str(path), rule, len(lines))
    for before, after in itertools.pairwise(lines):
        require(before.at_s <= after.at_s, str(path), "must be in ascending order of at_s", after)
    for line in lines:
        require(line.prompt >= 1 and line.output >= 1, str(path), "must have prompts and outputs >= 1", line)
    return tuple(dataclasses.replace(line, at_s=line.at_s - lines[0].at_s) for line in lines)
