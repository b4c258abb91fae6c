"""How an engine stands: its load, with what it can still take, and its counts. Pure; reads scheduler and pool.

The router owns waiting: what is offered here is what keeps the next steps full, and no more.
"""

from __future__ import annotations

from workers.blocks import BlockPool
from workers.scheduler import Scheduler
from workers.types import EngineCounts, Load


def load_of(scheduler: Scheduler, pool: BlockPool, chunk_tokens: int, max_num_sequences: int, num_taken: int) -> Load:
    """Return the load of the engine that has these, a budget of `chunk_tokens` a step and so many places, and that has
    counted `num_taken` works."""
    owed = scheduler.owed_prefill_tokens
    places = credit_sequences(scheduler, max_num_sequences)
    return Load(
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        num_blocks=pool.num_blocks,
        num_free_blocks=pool.num_free,
        owed_prefill_tokens=owed,
        credit_tokens=credit_tokens(scheduler, owed, chunk_tokens) if places else 0,
        credit_sequences=places,
        num_preemptions=scheduler.num_preemptions,
        prefix_cache_queries=scheduler.prefix_cache_queries,
        prefix_cache_hits=scheduler.prefix_cache_hits,
        num_computed_tokens=scheduler.commits.num_computed_tokens,
        num_steps=scheduler.num_steps,
        num_drafted_tokens=scheduler.commits.num_drafted_tokens,
        num_accepted_tokens=scheduler.commits.num_accepted_tokens,
        num_taken=num_taken,
        resident=pool.resident(),
    )


def credit_tokens(scheduler: Scheduler, owed: int, chunk_tokens: int) -> int:
    """Return the prompt tokens of new work that keep the next two steps full, while so many are `owed`."""
    if not scheduler.running and not scheduler.waiting:
        return 2 * chunk_tokens
    return 0 if scheduler.is_short_of_blocks else max(0, 2 * chunk_tokens - owed)


def credit_sequences(scheduler: Scheduler, max_num_sequences: int) -> int:
    """Return how many new sequences find a place now, or within the two steps that it takes a router to hear of it and
    to send: those that end by then make way, one in any case. All others wait in the router, where order can still
    change: one that is here goes before whatever comes there."""
    running = scheduler.running
    # One that is quiet for two more tokens has as many to come, and most are.
    near = [s for s in running if s.quiet_until <= s.num_scheduled + 2]
    num_ending = sum(s.num_tokens + 1 >= s.max_stored_tokens for s in near)
    num_places = max_num_sequences - len(running) - len(scheduler.waiting)
    return max(0, num_places + max(1, num_ending))


def counts_of(scheduler: Scheduler, pool: BlockPool) -> EngineCounts:
    """Return what only metrics need. From any thread: each number is read once."""
    return EngineCounts(
        num_prompt_tokens=scheduler.prefix_cache_queries,
        num_generated_tokens=scheduler.commits.num_generated_tokens,
        num_evicted_blocks=pool.num_evictions,
        num_cached_blocks=pool.num_cached,
    )
