"""What vLLM has told of its steps, added up: the load of a replica, and what its metrics need. Pure."""

from __future__ import annotations

from workers.types import EngineCounts, Load
from workers.vllm_engine.versions import Sizes, StepStats


class Totals:
    def __init__(self) -> None:
        self.num_taken = 0
        """Works that were counted, in the order in which they were submitted."""
        self._last = StepStats(0, 0, 0.0, 0, 0, 0, 0, 0)
        self._num_steps = 0
        self._queries = self._hits = self._preemptions = self._prompt_tokens = self._generated_tokens = 0

    def add(self, stats: StepStats) -> None:
        """Take in what was told of one step."""
        self._last = stats
        self._num_steps += 1
        self._queries += stats.cache_queries
        self._hits += stats.cache_hits
        self._preemptions += stats.num_preempted
        self._prompt_tokens += stats.num_prompt_tokens
        self._generated_tokens += stats.num_generated_tokens

    def load(self, sizes: Sizes, *, owed_tokens: int, num_open: int) -> Load:
        """Return the load with so many prompt tokens to compute and choices that have not ended.

        Places are those that vLLM has at once, and one more, so that the next step is full when one ends. vLLM tells of
        its blocks after a step: with nothing open none is held, whatever the last one said."""
        running = min(self._last.num_running, num_open)
        used = round(self._last.kv_usage * sizes.num_blocks) if num_open else 0
        places = max(0, sizes.max_num_sequences - num_open + 1)
        return Load(
            num_running=running,
            num_waiting=num_open - running,
            num_blocks=sizes.num_blocks,
            num_free_blocks=sizes.num_blocks - used,
            owed_prefill_tokens=owed_tokens,
            credit_tokens=max(0, 2 * sizes.step_tokens - owed_tokens) if places else 0,
            credit_sequences=places,
            num_preemptions=self._preemptions,
            prefix_cache_queries=self._queries,
            prefix_cache_hits=self._hits,
            num_computed_tokens=self._prompt_tokens - self._hits + self._generated_tokens,
            num_steps=self._num_steps,
            num_taken=self.num_taken,
        )

    def counts(self, *, num_findable: int, num_removed: int, num_used: int) -> EngineCounts:
        """Return what only metrics need. vLLM does not say which of the blocks that can be found are held just now: at
        least those that are more than all that are held are not."""
        return EngineCounts(
            num_prompt_tokens=self._prompt_tokens,
            num_generated_tokens=self._generated_tokens,
            num_evicted_blocks=num_removed,
            num_cached_blocks=max(0, num_findable - num_used),
        )
