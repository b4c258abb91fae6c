"""An engine whose every token says when it was made, so that its age at the client can be measured without a trace:

    token id = RIG_WORDS.start + floor(CLOCK_MONOTONIC in seconds * TICKS_PER_S) % len(RIG_WORDS)

with 0.2 ms a tick, unambiguous up to 6.6 s; all processes of a machine share that clock. Otherwise it is the engine
`fake`: scheduler, blocks, hashes, deadlines and credits are the real ones. Its answers differ from run to run.
Steps end every `step_s`, whatever computing them takes: a rate of tokens can be asked for, and is kept while it can be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from load_tests.rigs.router_model import RIG_WORDS
from workers.config import EngineConfig
from workers.engine import PagedEngine
from workers.fake import FakeEngine
from workers.plan import StepOutput, StepPlan
from workers.prefix import PrefixHasher
from workers.types import ModelManifest

TICKS_PER_S: Final = 5_000


@dataclass(frozen=True, slots=True)
class ClockTicket:
    """A step that ends at `ends_at` (monotonic) when it is read; what it samples is the time at its end."""

    plan: StepPlan
    ends_at: float

    def output(self) -> StepOutput:
        time.sleep(max(0.0, self.ends_at - time.monotonic()))
        word = (RIG_WORDS[int(time.monotonic() * TICKS_PER_S) % len(RIG_WORDS)],)
        return StepOutput(tuple(word if chunk.samples else () for chunk in self.plan.chunks))


class ClockRunner:
    """Implements `workers.plan.Runner`."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._ends_at = 0.0

    def launch(self, plan: StepPlan) -> ClockTicket:
        # Up to one step is caught up with; more would make a burst of what was late.
        now = time.monotonic()
        self._ends_at = self._step_s + (self._ends_at if now - self._ends_at < self._step_s else now)
        return ClockTicket(plan, self._ends_at)

    def close(self) -> None:
        """Nothing is held."""


def clock_engine(config: EngineConfig, *, manifest: ModelManifest, hash_key: bytes) -> PagedEngine:
    """Return the engine; `config.fake_step_s` is how long a step takes."""
    return PagedEngine(
        config,
        info=FakeEngine(config, manifest=manifest, hash_key=hash_key).info,
        runner=ClockRunner(config.fake_step_s),
        hasher=PrefixHasher(hash_key, config.block_size),
    )
