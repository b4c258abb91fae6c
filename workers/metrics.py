"""The metrics of a replica: those of `octavo.metrics` with ``where="replica"``, made with the OpenTelemetry API only.

What the engine counts anyway is observed when somebody asks for it, on the asker's thread; only a step's time is
recorded as it comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from octavo import metrics as names
from octavo.metrics import Metric
from octavo.names import Attribute
from opentelemetry.metrics import CallbackOptions, Meter, Observation

from workers.step_watch import StepRecord
from workers.types import Engine, EngineCounts, Load

T = TypeVar("T")


class ReplicaMetrics:
    """Of `engine`, for as long as the process lives. `model`: what requests call it. `counts`: None for an engine that
    has none, and whose steps nobody watches."""

    def __init__(
        self, meter: Meter, engine: Engine, model: str, counts: Callable[[], EngineCounts] | None = None
    ) -> None:
        self._engine = engine
        self._counts = counts
        self._meter = meter
        self._model = {Attribute.REQUEST_MODEL: model}
        self._steps = names.STEP_DURATION.create(self._meter)
        self._phase_s = dict.fromkeys(("schedule", "run", "sample", "emit"), 0.0)
        for metric, of_load in _OF_LOAD.items():
            self._observe(metric, of_load, engine.load)
        names.KV_BLOCKS.create(self._meter, self._blocks)
        if counts is not None:
            for metric, of_counts in _OF_COUNTS.items():
                self._observe(metric, of_counts, counts)
            names.STEP_PHASE_SECONDS.create(self._meter, self._phases)

    def step(self, record: StepRecord) -> None:
        """Account for a step."""
        self._steps.record(record.duration_s, self._model)
        phase_s = self._phase_s
        phase_s["schedule"] += record.schedule_s
        phase_s["run"] += record.run_s
        phase_s["sample"] += record.sample_s
        phase_s["emit"] += record.emit_s

    def _observe(self, metric: Metric, value: Callable[[T], float], source: Callable[[], T]) -> None:
        metric.create(self._meter, lambda _options: [Observation(value(source()), self._model)])

    def _blocks(self, _options: CallbackOptions) -> Sequence[Observation]:
        load = self._engine.load()
        num_cached = min(0 if self._counts is None else self._counts().num_cached_blocks, load.num_free_blocks)
        numbers = {
            "used": load.num_blocks - load.num_free_blocks,
            "cached": num_cached,
            "free": load.num_free_blocks - num_cached,
        }
        return [Observation(n, {**self._model, Attribute.BLOCK_STATE: state}) for state, n in numbers.items()]

    def _phases(self, _options: CallbackOptions) -> Sequence[Observation]:
        return [
            Observation(seconds, {**self._model, Attribute.STEP_PHASE: phase})
            for phase, seconds in self._phase_s.items()
        ]


def _kv_usage(load: Load) -> float:
    return 1 - load.num_free_blocks / load.num_blocks if load.num_blocks else 0.0


_OF_LOAD: dict[Metric, Callable[[Load], float]] = {
    names.ENGINE_RUNNING: lambda load: load.num_running,
    names.ENGINE_WAITING: lambda load: load.num_waiting,
    names.ENGINE_OWED_TOKENS: lambda load: load.owed_prefill_tokens,
    names.KV_USAGE: _kv_usage,
    names.PREFIX_CACHE_QUERIES: lambda load: load.prefix_cache_queries,
    names.PREFIX_CACHE_HITS: lambda load: load.prefix_cache_hits,
    names.PREEMPTIONS: lambda load: load.num_preemptions,
    names.COMPUTED_TOKENS: lambda load: load.num_computed_tokens,
    names.DRAFTED_TOKENS: lambda load: load.num_drafted_tokens,
    names.ACCEPTED_TOKENS: lambda load: load.num_accepted_tokens,
    names.STEPS: lambda load: load.num_steps,
}
_OF_COUNTS: dict[Metric, Callable[[EngineCounts], float]] = {
    names.PREFIX_CACHE_EVICTIONS: lambda counts: counts.num_evicted_blocks,
    names.PROMPT_TOKENS: lambda counts: counts.num_prompt_tokens,
    names.GENERATED_TOKENS: lambda counts: counts.num_generated_tokens,
}
